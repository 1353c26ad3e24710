// Runs an AOTInductor package that contains moe_ops' operators, in a process without Python.
//
//     run_package PACKAGE.pt2 INPUTS.pt [--library LIBRARY.so]... [--output OUTPUT.pt] [--expect EXPECTED.pt]
//
// INPUTS.pt is a tensor, or a list or tuple of tensors, written by torch.save, on the package's device; so are the
// outputs.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr const char* kUsage =
    "usage: run_package PACKAGE.pt2 INPUTS.pt [--library LIBRARY.so]... [--output OUTPUT.pt] [--expect EXPECTED.pt]";

// Of the largest difference to the expected outputs, relative to their largest element.
constexpr double kTolerance = 1e-5;

struct Options {
  std::string package;
  std::string inputs;
  std::vector<std::string> libraries;
  std::string output;
  std::string expected;
};

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  std::vector<std::string> files;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument.rfind("--", 0) != 0) {
      files.push_back(argument);
      continue;
    }
    if (i + 1 == arguments.size()) throw std::invalid_argument(argument + " needs a value\n" + kUsage);
    const std::string& value = arguments[++i];
    if (argument == "--library") {
      options.libraries.push_back(value);
    } else if (argument == "--output") {
      options.output = value;
    } else if (argument == "--expect") {
      options.expected = value;
    } else {
      throw std::invalid_argument("unknown option " + argument + "\n" + kUsage);
    }
  }
  if (files.size() != 2) throw std::invalid_argument(kUsage);
  options.package = files[0];
  options.inputs = files[1];
  return options;
}

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const c10::IValue value = torch::jit::pickle_load(bytes);
  if (value.isTensor()) return {value.toTensor()};
  std::vector<at::Tensor> tensors;
  const auto add = [&](const c10::IValue& element) {
    if (!element.isTensor()) throw std::runtime_error(path + " holds a " + element.tagKind() + ", expected tensors");
    tensors.push_back(element.toTensor());
  };
  if (value.isList()) {
    for (const c10::IValue& element : value.toListRef()) add(element);
  } else if (value.isTuple()) {
    for (const c10::IValue& element : value.toTupleRef().elements()) add(element);
  } else {
    throw std::runtime_error(path + " holds a " + value.tagKind() + ", expected a tensor, or a list or tuple of them");
  }
  return tensors;
}

void write_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  // A tuple: torch.load takes one with weights_only=True, and no list of tensors as C++ writes it.
  const std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error(path + " cannot be written");
}

void load_library(const std::string& path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
}

// Whether the outputs are the expected ones; prints how far apart they are.
bool compare(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& expected) {
  if (outputs.size() != expected.size()) {
    std::cout << outputs.size() << " outputs, expected " << expected.size() << "\n";
    return false;
  }
  bool equal = true;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const at::Tensor got = outputs[i].cpu(), want = expected[i].cpu();
    if (got.sizes() != want.sizes() || got.dtype() != want.dtype()) {
      std::cout << "output " << i << ": expected " << want.dtype() << " " << want.sizes() << "\n";
      equal = false;
      continue;
    }
    if (want.numel() == 0) continue;
    const at::Tensor got64 = got.to(at::kDouble), want64 = want.to(at::kDouble);
    const double difference = (got64 - want64).abs().max().item<double>();
    const double largest = want64.abs().max().item<double>();
    std::cout << "output " << i << ": largest difference " << difference << ", largest expected " << largest << "\n";
    // Written so that a NaN is a difference.
    if (!(difference <= kTolerance * largest)) equal = false;
  }
  std::cout << (equal ? "as expected" : "NOT as expected") << "\n";
  return equal;
}

int run(const Options& options) {
  for (const std::string& library : options.libraries) load_library(library);
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader package(options.package);
  const std::vector<at::Tensor> outputs = package.run(read_tensors(options.inputs));
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::cout << "output " << i << ": " << outputs[i].dtype() << " " << outputs[i].sizes() << " sum "
              << std::setprecision(8) << outputs[i].sum(at::kDouble).item<double>() << "\n";
  }
  if (!options.output.empty()) write_tensors(options.output, outputs);
  return options.expected.empty() || compare(outputs, read_tensors(options.expected)) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(std::vector<std::string>(argv + 1, argv + argc)));
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
