// Launch tables, as `python -m moe_ops aot` writes them (moe_ops/aot/table.py says what the lines mean): what to launch
// for a call and a number of tokens. Nothing is decided here.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "checks.h"

namespace moe_ops {

// A number that depends on the number of tokens, in reverse Polish notation.
class Formula {
 public:
  explicit Formula(const std::string& text);
  int64_t at(int64_t num_tokens) const;

 private:
  struct Token {
    char symbol;  // of an operation; 'n' is a number, 'M' the number of tokens
    int64_t number;
  };
  std::vector<Token> tokens_;
};

enum class Kind { kPointer, kInt32, kInt64, kFloat32, kTensorMap };

// An argument of a launch. A tensor map's shape and strides are the numbers that follow it.
struct Argument {
  Kind kind;
  Formula number;       // of a number; the offset in bytes of a pointer and of a tensor map
  size_t place = 0;     // of a pointer and of a tensor map: a tensor argument, the result, or a workspace
  int dtype = 0;        // of a tensor map, as the driver counts them
  int element_size = 0;
  int swizzle = 0;
  std::vector<uint32_t> box{};
};

// Places: the tensor arguments in the schema's order, the result, the workspaces.
constexpr size_t kOutPlace = kNumTensors, kFirstBuffer = kNumTensors + 1;
constexpr size_t kMaxRank = 5;  // of a tensor map

struct Kernel {
  std::string file;
  std::string name;
  unsigned threads;
  unsigned shared_bytes;
  bool dependent;
};

struct Launch {
  size_t kernel;
  Formula grid;
  std::vector<Argument> arguments;
};

// What is launched for some numbers of tokens.
struct Entry {
  int64_t first_tokens;
  int64_t last_tokens;
  ScalarType out_dtype{};
  std::vector<Formula> out_shape;
  std::vector<Formula> buffers;  // bytes
  std::vector<Launch> launches;

  std::vector<int64_t> shape_of_out(int64_t num_tokens) const;
};

// What is launched for a call.
struct Table {
  std::string call;
  int arch = 0;
  int multiprocessors = 0;
  std::vector<Kernel> kernels;
  std::vector<Entry> entries;
};

// The tables of a folder by their calls.
using Tables = std::map<std::string, Table>;
Tables read_tables(const std::string& folder);

// Whether a tensor argument's first size is the number of tokens.
bool is_per_token(const std::string& name, const Tensor& tensor);

// The call without its number of tokens: moe_ops.aot.calls.call_text.
std::string call_text(const Arguments& args);

// Throws std::runtime_error, which names the call and the command that compiles it, where the tables have it not.
// `folder` is where the tables come from, "" if no folder was named.
const Table& find_table(const Tables& tables, const std::string& folder, const std::string& call, int64_t num_tokens);
const Entry& find_entry(const Table& table, const std::string& folder, int64_t num_tokens);

// The launches for a number of tokens, with all numbers in the place of formulas, in a table's words.
std::string describe_launches(const Table& table, const Entry& entry, int64_t num_tokens);

}  // namespace moe_ops
