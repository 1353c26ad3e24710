"""The tuner: candidates near the heuristic, tried and timed in processes of their own. Never in the serving path."""
