#include "bindings/buffers.hpp"

#include <cstring>
#include <string>
#include <utility>

#include "apis/check.hpp"

namespace taper {
namespace {

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
      return "float32";
    case Dtype::f16:
      return "float16";
    case Dtype::f64:
      return "float64";
    case Dtype::i8:
      return "int8";
    case Dtype::u8:
      return "uint8";
    case Dtype::i16:
      return "int16";
    case Dtype::i32:
      return "int32";
    case Dtype::i64:
      return "int64";
    case Dtype::u16:
      return "uint16";
  }
  return "";
}

// The struct-module letter of a native array; long and long long are both 8 bytes on the platforms that we build for.
bool format_matches(const char* format, int64_t itemsize, Dtype dtype) {
  if (format == nullptr || format[0] == '\0' || format[1] != '\0') return false;
  switch (dtype) {
    case Dtype::f32:
      return format[0] == 'f';
    case Dtype::f16:
      return format[0] == 'e';
    case Dtype::f64:
      return format[0] == 'd';
    case Dtype::i8:
      return format[0] == 'b';
    case Dtype::u8:
      return format[0] == 'B';
    case Dtype::i16:
      return format[0] == 'h';
    case Dtype::i32:
      return std::strchr("il", format[0]) != nullptr && itemsize == 4;
    case Dtype::i64:
      return std::strchr("lq", format[0]) != nullptr && itemsize == 8;
    case Dtype::u16:
      return format[0] == 'H';
  }
  return false;
}

std::string describe(nb::handle array) {
  const nb::object type =
      nb::hasattr(array, "dtype") ? nb::object(array.attr("dtype")) : nb::object(array.type().attr("__name__"));
  return nb::str(nb::handle(type)).c_str();
}

[[noreturn]] void refuse_dtype(nb::handle array, const char* name, std::initializer_list<Dtype> dtypes) {
  std::string expected;
  for (const Dtype dtype : dtypes) expected += (expected.empty() ? "" : " or ") + std::string(name_of(dtype));
  throw nb::type_error(text(name, " is ", describe(array), ", expected a NumPy array of ", expected).c_str());
}

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

PyObject* numpy_attribute(const char* name) {
  return nb::object(nb::module_::import_("numpy").attr(name)).release().ptr();
}

bool is_aligned(const Py_buffer& view) { return reinterpret_cast<uintptr_t>(view.buf) % view.itemsize == 0; }

}  // namespace

Buffer::Buffer(nb::handle array, const char* name, std::initializer_list<Dtype> dtypes, int ndim, bool writable,
               bool gaps) {
  if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();
    refuse_dtype(array, name, dtypes);
  }
  // From here on the borrow has to be given back when the array is refused.
  try {
    const Dtype* found = nullptr;
    for (const Dtype& dtype : dtypes) {
      if (format_matches(view_.format, view_.itemsize, dtype)) found = &dtype;
    }
    if (found == nullptr) refuse_dtype(array, name, dtypes);
    dtype_ = *found;
    if (ndim >= 0 && view_.ndim != ndim) refuse(text(name, " has ", view_.ndim, " dimensions, expected ", ndim));
    const bool rows_apart = gaps && view_.ndim == 2 && view_.strides[1] == view_.itemsize &&
                            view_.strides[0] >= view_.shape[1] * view_.itemsize;
    if (!rows_apart && !PyBuffer_IsContiguous(&view_, 'C'))
      refuse(text(name, " is not C-contiguous; pass numpy.ascontiguousarray of it"));
    if (!is_aligned(view_))
      refuse(text(name, " is not aligned to its ", view_.itemsize, "-byte elements; pass a copy"));
    if (writable && view_.readonly) refuse(text(name, " is read-only, expected a writable array"));
  } catch (...) {
    PyBuffer_Release(&view_);
    throw;
  }
}

Buffer::Buffer(Buffer&& other) noexcept : view_(other.view_), dtype_(other.dtype_) {
  other.view_.obj = nullptr;  // PyBuffer_Release does nothing to it then
  if (view_.shape == &other.view_.len) view_.shape = &view_.len;
}

Buffer::~Buffer() { PyBuffer_Release(&view_); }

nb::object numpy_empty(std::initializer_list<int64_t> shape, Dtype dtype) {
  // Kept for the life of the process: looking them up costs more than the call.
  static PyObject* const empty = numpy_attribute("empty");
  static PyObject* const dtypes[] = {numpy_attribute("float32"), numpy_attribute("float16"), numpy_attribute("float64"),
                                     numpy_attribute("int8"),    numpy_attribute("uint8"),   numpy_attribute("int16"),
                                     numpy_attribute("int32"),   numpy_attribute("int64"),   numpy_attribute("uint16")};
  nb::object dims = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
  Py_ssize_t axis = 0;
  for (const int64_t length : shape) PyTuple_SetItem(dims.ptr(), axis++, PyLong_FromLongLong(length));
  PyObject* arguments[] = {dims.ptr(), dtypes[static_cast<int>(dtype)]};
  PyObject* array = PyObject_Vectorcall(empty, arguments, 2, nullptr);
  if (array == nullptr) throw nb::python_error();
  return nb::steal(array);
}

void require_size(const Buffer& buffer, const char* name, int64_t expected) {
  if (buffer.size() != expected) refuse(text(name, " has ", buffer.size(), " elements, expected ", expected));
}

}  // namespace taper
