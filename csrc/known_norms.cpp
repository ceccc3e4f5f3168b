#include "known_norms.h"

#include <limits>
#include <vector>

#include "dispatch.h"

namespace py = pybind11;

namespace vgkern {
namespace {

int64_t version_of(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
  if (!version) throw py::error_already_set();
  return version.cast<int64_t>();
}

}  // namespace

void KnownNorms::take(py::sequence parameters, py::sequence gradients, const Arrays& arrays, int threads) {
  const size_t count = arrays.list.size();
  std::vector<Known> found;
  for (size_t i = 0; i < count; ++i) found.push_back({arrays.list[i].data, version_of(gradients[i]), 0, 0});
  std::vector<double> norms(count), samples(count);
  {
    const py::gil_scoped_release release;
    gradient_norms(kernels(), arrays.list, 2, std::numeric_limits<double>::infinity(), threads, norms.data());
    sample_norms(kernels(), arrays.list, samples.data());
  }
  for (size_t i = 0; i < count; ++i) {
    found[i].norm = norms[i];
    found[i].sample = samples[i];
    known_[py::object(parameters[i]).ptr()] = found[i];
  }
}

void KnownNorms::add(py::handle parameter, py::handle gradient, const void* address, double norm, double sample) {
  known_[parameter.ptr()] = {address, version_of(gradient), norm, sample};
}

py::tuple KnownNorms::unchanged(py::sequence parameters, py::sequence gradients, const Arrays& arrays) const {
  py::list norms, others;
  for (size_t i = 0; i < arrays.list.size(); ++i) {
    const Array& array = arrays.list[i];
    const py::object gradient = gradients[i];
    const auto known = known_.find(py::object(parameters[i]).ptr());
    bool same =
        known != known_.end() && known->second.address == array.data && known->second.version == version_of(gradient);
    if (same) {
      double sample;
      sample_norms(kernels(), {array}, &sample);
      same = sample == known->second.sample && (sample > 0 || array.count <= kSampled);
    }
    if (same) {
      norms.append(known->second.norm);
    } else {
      others.append(gradient);
    }
  }
  return py::make_tuple(std::move(norms), std::move(others));
}

}  // namespace vgkern
