#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.hpp"
#include "runtime/cores.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {

namespace nb = nanobind;

void bind_runtime(nb::module_& m) {
  m.def("isa", [] { return kernels().name; });
  m.def("use_isa", &use_isa, nb::arg("name"));
  m.def("available_isas", &available_isas);
  m.def("available_cores", &available_cores);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, nb::arg("count"), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace taper
