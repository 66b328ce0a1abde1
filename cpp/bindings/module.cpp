#include "bindings/bindings.hpp"

NB_MODULE(_native, m) {
  m.doc() = "Taper's native library; taper.kernels is its face.";
  taper::bind_runtime(m);
  taper::bind_activations(m);
  taper::bind_planes(m);
  taper::bind_rows(m);
  taper::bind_attention(m);
  taper::bind_solver(m);
  taper::bind_row_tables(m);
  taper::bind_outliers(m);
  taper::bind_planes_cache(m);
  taper::bind_anda(m);
  taper::bind_decoder(m);
}
