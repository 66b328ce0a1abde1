// One function a noun; module.cpp calls them.
#pragma once

#include <nanobind/nanobind.h>

namespace taper {

void bind_runtime(nanobind::module_& m);
void bind_activations(nanobind::module_& m);
void bind_planes(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_solver(nanobind::module_& m);
void bind_row_tables(nanobind::module_& m);
void bind_outliers(nanobind::module_& m);
void bind_planes_cache(nanobind::module_& m);
void bind_anda(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);

}  // namespace taper
