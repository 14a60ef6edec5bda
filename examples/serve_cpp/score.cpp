// Scores batches with a model that `saml-rec export` wrote, in a process without Python.
//
//   score model.pt2 _ops.torch2.13.so rows.pt              one prediction a line
//   score model.pt2 _ops.torch2.13.so rows.pt 200          besides, microseconds of each of 200 calls, on stderr
//
// rows.pt is a list of tensors as torch.save writes it, in the order of the manifest's "inputs". The library "-" is
// none, of a model that calls none.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error(path + ": cannot be read");
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue list = torch::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& each : list.toListRef()) {
    tensors.push_back(each.toTensor());
  }
  return tensors;
}

// The operators register themselves when their library is loaded; the model's program then finds them.
void load_operators(const std::string& path) {
  if (path != "-" && dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw std::runtime_error(dlerror());
  }
}

int main(int count, char** given) try {
  if (count != 4 && count != 5) {
    throw std::runtime_error("usage: score MODEL OPERATORS ROWS [CALLS]");
  }
  const c10::InferenceMode guard;
  load_operators(given[2]);
  torch::inductor::AOTIModelPackageLoader model(given[1]);
  const std::vector<at::Tensor> inputs = read_tensors(given[3]);

  const at::Tensor predictions = model.run(inputs).at(1).contiguous();
  for (int64_t row = 0; row < predictions.numel(); ++row) {
    std::printf("%.17g\n", predictions.const_data_ptr<double>()[row]);
  }
  for (int call = 0; count == 5 && call < std::stoi(given[4]); ++call) {
    const auto start = std::chrono::steady_clock::now();
    model.run(inputs);
    const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
    std::fprintf(stderr, "%.1f\n", taken.count());
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
