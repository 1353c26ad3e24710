"""A mutation of a kernel's source: one small mistake."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """A mistake: `old`, which stands in moe_ops/kernels/`file` once, becomes `new`.

    Attributes:
        name: of the mutant.
        file: under moe_ops/kernels, without .py.
        old: the exact source text.
        new: what takes its place.
        breaks: what is wrong then.
        first: the check of `checks` to begin with; the others follow if it lets the mutant live.
        in_full: checked only with MOE_OPS_TESTS=all, since another mutant is of its kind.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    first: str
    in_full: bool = False

    def apply(self, package: Path) -> str:
        """Edits the copy of the package; returns the mutated source."""
        path = package / "kernels" / f"{self.file}.py"
        source = path.read_text()
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {source.count(self.old)} times in {self.file}.py")
        mutated = source.replace(self.old, self.new)
        path.write_text(mutated)
        return mutated
