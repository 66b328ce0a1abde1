// NumPy arrays at the border: borrowed through the buffer protocol, made by calling numpy.empty.
//
// A borrow costs about 0.1 us where nanobind's ndarray goes through DLPack for about 1 us, and a decode step of a small
// model makes some hundred calls. Nothing is converted or copied: another dtype or layout is refused.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>

namespace taper {

namespace nb = nanobind;

enum class Dtype { f32, f16, f64, i8, u8, i16, i32, i64, u16 };

template <class T>
constexpr Dtype dtype_of();
template <>
constexpr Dtype dtype_of<float>() {
  return Dtype::f32;
}
template <>
constexpr Dtype dtype_of<double>() {
  return Dtype::f64;
}
template <>
constexpr Dtype dtype_of<int8_t>() {
  return Dtype::i8;
}
template <>
constexpr Dtype dtype_of<uint8_t>() {
  return Dtype::u8;
}
template <>
constexpr Dtype dtype_of<int16_t>() {
  return Dtype::i16;
}
template <>
constexpr Dtype dtype_of<int32_t>() {
  return Dtype::i32;
}
template <>
constexpr Dtype dtype_of<int64_t>() {
  return Dtype::i64;
}

// A C-contiguous array that stays alive and in place as long as this object. Needs the GIL to be made and destroyed.
class Buffer {
 public:
  // `ndim` < 0 admits any. Throws nb::type_error for no array or another dtype, nb::value_error for another number of
  // dimensions, a layout that is not C-contiguous, or a read-only array where `writable` is asked for. With `gaps` the
  // rows of a matrix may lie apart, in rising order; such an array has no use for size().
  Buffer(nb::handle array, const char* name, std::initializer_list<Dtype> dtypes, int ndim, bool writable = false,
         bool gaps = false);
  Buffer(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  Dtype dtype() const { return dtype_; }
  int64_t shape(int axis) const { return view_.shape[axis]; }
  int64_t stride_bytes(int axis) const { return view_.strides[axis]; }
  int ndim() const { return view_.ndim; }
  int64_t size() const { return view_.len / view_.itemsize; }
  void* data() const { return view_.buf; }
  template <class T>
  T* as() const {
    return static_cast<T*>(view_.buf);
  }

 private:
  Py_buffer view_;
  Dtype dtype_;
};

template <class T>
Buffer borrow(nb::handle array, const char* name, int ndim) {
  return Buffer(array, name, {dtype_of<T>()}, ndim);
}

// A new NumPy array, and where its elements are.
template <class T>
struct NewArray {
  nb::object array;
  T* data;
};

nb::object numpy_empty(std::initializer_list<int64_t> shape, Dtype dtype);

template <class T>
NewArray<T> new_array(std::initializer_list<int64_t> shape) {
  nb::object array = numpy_empty(shape, dtype_of<T>());
  T* data = borrow<T>(array, "out", -1).template as<T>();
  return {std::move(array), data};
}

// Throws nb::value_error "name has SIZE elements, expected EXPECTED".
void require_size(const Buffer& buffer, const char* name, int64_t expected);

}  // namespace taper
