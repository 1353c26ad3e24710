#include "launch_table.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "text.h"

namespace moe_ops {
namespace {

constexpr const char* kHead = "moe_ops launches 1";
constexpr const char* kSuffix = ".launches";

int64_t divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

int64_t compute(char symbol, int64_t a, int64_t b) {
  switch (symbol) {
    case '+': return a + b;
    case '-': return a - b;
    case '*': return a * b;
    case '/': return divide(a, b);
    case '%': return a - divide(a, b) * b;
    default: return std::min(a, b);
  }
}

ScalarType compute_dtype(const std::string& name) {
  if (name == "bfloat16") return ScalarType::BFloat16;
  if (name == "float16") return ScalarType::Half;
  if (name == "float32") return ScalarType::Float;
  fail("dtype ", quoted(name), " of a result is unknown");
}

size_t find_place(const std::string& name) {
  const Arguments none{};
  size_t place = 0;
  for (const auto& [argument, tensor] : given_tensors(none)) {
    if (name == argument) return place;
    ++place;
  }
  if (name == "out") return kOutPlace;
  if (name.rfind("buffer", 0) != 0) fail("operand ", quoted(name), " is unknown");
  return kFirstBuffer + std::stoul(name.substr(6));
}

std::string place_text(size_t place) {
  if (place == kOutPlace) return "out";
  if (place >= kFirstBuffer) return "buffer" + std::to_string(place - kFirstBuffer);
  return given_tensors(Arguments{})[place].first;
}

std::string rest_of(std::istringstream& line) {
  std::string rest;
  std::getline(line >> std::ws, rest);
  return rest;
}

template <typename T>
T read(std::istringstream& line) {
  T value{};
  if (!(line >> value)) fail("a value is missing");
  return value;
}

Argument read_argument(const std::string& word, std::istringstream& line) {
  if (word == "i32") return {Kind::kInt32, Formula(rest_of(line))};
  if (word == "i64") return {Kind::kInt64, Formula(rest_of(line))};
  if (word == "fp32") return {Kind::kFloat32, Formula(rest_of(line))};
  if (word != "pointer" && word != "map") fail(quoted(word), " is unknown");
  const size_t place = find_place(read<std::string>(line));
  Argument argument{word == "map" ? Kind::kTensorMap : Kind::kPointer, Formula(read<std::string>(line)), place};
  if (argument.kind == Kind::kTensorMap) {
    argument.dtype = read<int>(line);
    argument.element_size = read<int>(line);
    argument.swizzle = read<int>(line);
    for (uint32_t size; line >> size;) argument.box.push_back(size);
  }
  return argument;
}

void read_line(const std::string& word, std::istringstream& line, const std::string& folder, Table& table) {
  if (word == "arch") {
    table.arch = read<int>(line);
  } else if (word == "multiprocessors") {
    table.multiprocessors = read<int>(line);
  } else if (word == "triton") {
    return;  // for people
  } else if (word == "call") {
    table.call = rest_of(line);
  } else if (word == "kernel") {
    Kernel kernel{folder + "/" + read<std::string>(line), read<std::string>(line), 0, 0, false};
    kernel.threads = read<unsigned>(line);
    kernel.shared_bytes = read<unsigned>(line);
    kernel.dependent = read<bool>(line);
    table.kernels.push_back(std::move(kernel));
  } else if (word == "tokens") {
    Entry entry{};
    entry.first_tokens = read<int64_t>(line);
    entry.last_tokens = read<int64_t>(line);
    table.entries.push_back(std::move(entry));
  } else if (table.entries.empty()) {
    fail(quoted(word), " comes before the first 'tokens'");
  } else if (Entry& entry = table.entries.back(); word == "out") {
    entry.out_dtype = compute_dtype(read<std::string>(line));
    for (std::string size; line >> size;) entry.out_shape.emplace_back(size);
  } else if (word == "buffer") {
    entry.buffers.emplace_back(rest_of(line));
  } else if (word == "launch") {
    const auto kernel = read<size_t>(line);
    if (kernel >= table.kernels.size()) fail("kernel ", kernel, " is not there");
    entry.launches.push_back({kernel, Formula(rest_of(line)), {}});
  } else if (entry.launches.empty()) {
    fail(quoted(word), " comes before the first 'launch'");
  } else {
    entry.launches.back().arguments.push_back(read_argument(word, line));
  }
}

// What a launch relies on: that what is named is there.
void check_entry(const Entry& entry) {
  for (const Launch& launch : entry.launches) {
    for (size_t i = 0; i < launch.arguments.size(); ++i) {
      const Argument& argument = launch.arguments[i];
      const size_t rank = argument.box.size(), after = launch.arguments.size() - i - 1;
      if (argument.place >= kFirstBuffer + entry.buffers.size()) fail(place_text(argument.place), " is not there");
      if (argument.kind == Kind::kTensorMap && (rank < 1 || rank > kMaxRank || after < 2 * rank)) {
        fail("a tensor map has rank ", rank, " and ", after, " arguments behind it");
      }
    }
  }
}

Table read_table(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string text;
  if (!std::getline(file, text) || text != kHead) {
    fail(path.string(), " begins with ", quoted(text), ", expected ", quoted(kHead),
         ": it is of another version of moe_ops; make it again with python -m moe_ops aot");
  }
  Table table;
  for (int number = 2; std::getline(file, text); ++number) {
    std::istringstream line(text);
    std::string word;
    line >> word;
    try {
      read_line(word, line, path.parent_path().string(), table);
    } catch (const std::exception& error) {
      fail(path.string(), ", line ", number, ": ", error.what(), "; make it again with python -m moe_ops aot");
    }
  }
  if (table.call.empty() || table.entries.empty()) fail(path.string(), " ends early; make it again");
  std::for_each(table.entries.begin(), table.entries.end(), check_entry);
  return table;
}

// A number as Python's f"{value:.17g}".
std::string number_text(double value) {
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, "%.17g", value);
  return buffer;
}

std::string dtype_text(ScalarType dtype) { return text(dtype).substr(6); }  // without "torch."

[[noreturn]] void refuse(const std::string& what, const std::string& folder, const std::string& call,
                         int64_t num_tokens) {
  int64_t most = 4096;
  while (most < num_tokens) most *= 2;
  fail(what, "; compile it, on any machine with moe_ops: python -m moe_ops aot --arch 90 --shapes '", call,
       "' --tokens 1-", most, " --out ", folder.empty() ? "DIR" : folder,
       folder.empty() ? ", and set MOE_OPS_AOT=DIR before the process starts" : ", and start the process again");
}

}  // namespace

Formula::Formula(const std::string& text) {
  std::istringstream words(text);
  int depth = 0;
  for (std::string word; words >> word;) {
    const bool number = word.find_first_not_of("0123456789") == std::string::npos;
    if (number) {
      tokens_.push_back({'n', std::stoll(word)});
    } else if (word == "M" || word == "min" || (word.size() == 1 && std::string("+-*/%").find(word) < 5)) {
      tokens_.push_back({word[0], 0});
    } else {
      fail(quoted(text), " is no formula");
    }
    depth += number || word == "M" ? 1 : -1;
    if (depth < 1) fail(quoted(text), " is no formula");
  }
  if (depth != 1) fail(quoted(text), " is no formula");
}

int64_t Formula::at(int64_t num_tokens) const {
  if (tokens_.size() == 1) return tokens_[0].symbol == 'M' ? num_tokens : tokens_[0].number;
  std::vector<int64_t> stack;
  stack.reserve(tokens_.size());
  for (const Token& token : tokens_) {
    if (token.symbol == 'n' || token.symbol == 'M') {
      stack.push_back(token.symbol == 'M' ? num_tokens : token.number);
      continue;
    }
    const int64_t right = stack.back();
    stack.pop_back();
    stack.back() = compute(token.symbol, stack.back(), right);
  }
  return stack.back();
}

std::vector<int64_t> Entry::shape_of_out(int64_t num_tokens) const {
  std::vector<int64_t> shape;
  for (const Formula& size : out_shape) shape.push_back(size.at(num_tokens));
  return shape;
}

bool is_per_token(const std::string& name, const Tensor& tensor) {
  return tensor.dim() == 2 &&
         (name == "hidden_states" || name == "topk_weights" || name == "topk_ids" || name == "a1_scale");
}

Tables read_tables(const std::string& folder) {
  Tables tables;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error)) {
    if (file.path().extension() != kSuffix) continue;
    Table table = read_table(file.path());
    std::string call = table.call;
    tables.emplace(std::move(call), std::move(table));
  }
  if (error) fail("MOE_OPS_AOT is ", quoted(folder), ", expected a folder of python -m moe_ops aot: ", error.message());
  return tables;
}

std::string call_text(const Arguments& args) {
  std::string result;
  const auto add = [&](const std::string& name, const std::string& value) {
    result += (result.empty() ? "" : " ") + name + "=" + value;
  };
  for (const auto& [name, tensor] : given_tensors(args)) {
    if (tensor == nullptr) continue;
    std::vector<int64_t> shape(tensor->sizes().begin(), tensor->sizes().end());
    if (args.quantization == "mxfp4_w4a16" && shape.size() == 4) {  // weights in blocks, as gpt-oss stores them
      shape[2] *= shape[3];
      shape.pop_back();
    }
    std::string sizes;
    for (size_t i = 0; i < shape.size(); ++i) {
      sizes += (i ? "," : "") + (i == 0 && is_per_token(name, *tensor) ? "M" : std::to_string(shape[i]));
    }
    add(name, dtype_text(tensor->scalar_type()) + "[" + sizes + "]");
  }
  if (args.activation != "silu") add("activation", args.activation);
  if (args.activation_alpha) add("activation_alpha", number_text(*args.activation_alpha));
  if (args.activation_limit) add("activation_limit", number_text(*args.activation_limit));
  if (args.gate_up_layout != "concatenated") add("gate_up_layout", args.gate_up_layout);
  if (args.quantization != "none") add("quantization", args.quantization);
  if (args.block_shape) {
    std::string sizes;
    for (const int64_t size : *args.block_shape) sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
    add("block_shape", "[" + sizes + "]");
  }
  if (args.apply_router_weight_on_input) add("apply_router_weight_on_input", "true");
  if (args.routed_scaling_factor != 1.0) add("routed_scaling_factor", number_text(args.routed_scaling_factor));
  if (!args.reduce_topk) add("reduce_topk", "false");
  if (args.out_dtype && *args.out_dtype != args.hidden_states.scalar_type()) {
    add("out_dtype", dtype_text(*args.out_dtype));
  }
  return result;
}

const Table& find_table(const Tables& tables, const std::string& folder, const std::string& call, int64_t num_tokens) {
  const auto found = tables.find(call);
  if (found == tables.end()) {
    refuse(folder.empty() ? "MOE_OPS_AOT is not set, and the C++ CUDA kernel launches what was compiled ahead of time: "
                            "this call has no table"
                          : "the tables in " + folder + " do not have this call",
           folder, call, num_tokens);
  }
  return found->second;
}

const Entry& find_entry(const Table& table, const std::string& folder, int64_t num_tokens) {
  for (const Entry& entry : table.entries) {
    if (entry.first_tokens <= num_tokens && num_tokens <= entry.last_tokens) return entry;
  }
  refuse("the table of this call in " + folder + " has " + std::to_string(table.entries.front().first_tokens) + " to " +
             std::to_string(table.entries.back().last_tokens) + " tokens, not M = " + std::to_string(num_tokens),
         folder, table.call, num_tokens);
}

std::string describe_launches(const Table& table, const Entry& entry, int64_t num_tokens) {
  std::ostringstream result;
  for (const int64_t size : entry.shape_of_out(num_tokens)) result << "out " << size << "\n";
  for (const Formula& bytes : entry.buffers) result << "buffer " << bytes.at(num_tokens) << "\n";
  for (const Launch& launch : entry.launches) {
    const Kernel& kernel = table.kernels[launch.kernel];
    result << "launch " << std::filesystem::path(kernel.file).filename().string() << " " << kernel.name << " "
           << kernel.threads << " " << kernel.shared_bytes << " " << kernel.dependent << " "
           << launch.grid.at(num_tokens) << "\n";
    for (const Argument& argument : launch.arguments) {
      constexpr const char* kWords[] = {"pointer", "i32", "i64", "fp32", "map"};
      result << kWords[static_cast<int>(argument.kind)] << " ";
      const bool placed = argument.kind == Kind::kPointer || argument.kind == Kind::kTensorMap;
      if (placed) result << place_text(argument.place) << " ";
      result << argument.number.at(num_tokens);
      if (argument.kind == Kind::kTensorMap) {
        result << " " << argument.dtype << " " << argument.element_size << " " << argument.swizzle;
        for (const uint32_t size : argument.box) result << " " << size;
      }
      result << "\n";
    }
  }
  return result.str();
}

}  // namespace moe_ops

// What the CUDA kernel would launch, without a GPU: `describe_launches` of a folder's tables, or an error's words after
// "error: ". The text lives until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* moe_ops_launches(const char* folder, const char* call,
                                                                               int64_t num_tokens) {
  static thread_local std::string text;
  try {
    const moe_ops::Tables tables = moe_ops::read_tables(folder);
    const moe_ops::Table& table = moe_ops::find_table(tables, folder, call, num_tokens);
    text = moe_ops::describe_launches(table, moe_ops::find_entry(table, folder, num_tokens), num_tokens);
  } catch (const std::exception& error) {
    text = std::string("error: ") + error.what();
  }
  return text.c_str();
}
