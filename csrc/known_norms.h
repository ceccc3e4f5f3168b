// Norms of gradients that were taken, and how to tell that a gradient is still the one that was measured; behind
// vgkern/gradients/hot_norms.py. In C++ since the caches hold little of Python's when a gradient has been produced: of
// a training step each line there took 1 µs.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_map>

#include "tensors.h"

namespace vgkern {

// By parameter, which is not kept alive. Lists go together: gradient i and array i are of parameter i.
class KnownNorms {
 public:
  // L2 norms of dense gradients, and of their first kSampled elements.
  void take(pybind11::sequence parameters, pybind11::sequence gradients, const Arrays& arrays, int threads);

  // The same of one gradient, from whoever measured it.
  void add(pybind11::handle parameter, pybind11::handle gradient, const void* address, double norm, double sample);

  // (norms of those that are known and have the same address, version and norm of the first elements, the other
  // gradients). Of zeros the first elements tell nothing: only what is not longer is known by them.
  pybind11::tuple unchanged(pybind11::sequence parameters, pybind11::sequence gradients, const Arrays& arrays) const;

  void forget() { known_.clear(); }
  size_t size() const { return known_.size(); }

 private:
  struct Known {
    const void* address;
    int64_t version;  // as autograd counts a tensor's changes
    double norm, sample;
  };

  std::unordered_map<const PyObject*, Known> known_;
};

}  // namespace vgkern
