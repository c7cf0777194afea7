#pragma once

#include <tuple>

#include "kernels/loss.h"
#include "ops/tensor.h"

namespace ternary {

template <void (*run)(const DistillationArgs&, const Tensor& student)>
std::tuple<Tensor, Tensor> distillation(Tensor student, const Tensor& teacher, const Tensor& labels,
                                        double kl_weight, double temperature) {
  const DType type = float_type(student, "student");
  check_dim(student, 2, "student");
  check_contiguous(student, "student");
  check_type(teacher, student.scalar_type(), "teacher");
  check_shape(teacher, {student.size(0), student.size(1)}, "teacher");
  check_contiguous(teacher, "teacher");
  check_device(teacher, student, "teacher");
  check_type(labels, ScalarType::Long, "labels");
  check_shape(labels, {student.size(0)}, "labels");
  check_contiguous(labels, "labels");
  check_device(labels, student, "labels");
  STD_TORCH_CHECK(student.size(1) > 0, "student must have at least one column, not ", shape(student));
  Tensor kl = torch::stable::new_empty(student, {student.size(0)}, ScalarType::Float);
  Tensor ce = torch::stable::new_empty(student, {student.size(0)}, ScalarType::Float);
  if (student.size(0) == 0) return {kl, ce};
  run({.student = student.mutable_data_ptr(),
       .teacher = teacher.const_data_ptr(),
       .type = type,
       .labels = labels.const_data_ptr<int64_t>(),
       .kl = kl.mutable_data_ptr<float>(),
       .ce = ce.mutable_data_ptr<float>(),
       .rows = student.size(0),
       .vocab = student.size(1),
       .kl_weight = static_cast<float>(kl_weight),
       .temperature = static_cast<float>(temperature)},
      student);
  return {kl, ce};
}

}  // namespace ternary
