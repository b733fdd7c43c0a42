// What the kernels do as OpenVINO operations: an MLP down(relu(up(x))²), and matrices that share an input.
#pragma once

#include <openvino/op/matmul.hpp>
#include <openvino/op/op.hpp>
#include <string>
#include <vector>

#include "ffn.h"
#include "linear.h"

namespace ov_afm {

struct MatrixAttributes {
  int64_t bits = 4;
  int64_t group = -1;  // 32, 64, 128, or -1 for one scale a row
  bool asymmetric = false;
};

// Inputs: activations f32 [..., hidden]; packed UP and DOWN weights, u8 [bytes] (layout.h). Output: f32 [..., hidden].
// Weights are bytes so that no pass of a plugin converts, reorders or folds them.
class ReLU2FFN : public ov::op::Op {
 public:
  OPENVINO_OP("ReLU2FFN", "ov_afm");

  ReLU2FFN() = default;
  explicit ReLU2FFN(const ov::OutputVector& inputs);

  void validate_and_infer_types() override;
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
  bool visit_attributes(ov::AttributeVisitor& visitor) override;
  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
  bool has_evaluate() const override { return true; }

 private:
  relu2::Ffn view(const void* up, const void* down) const;

  int64_t hidden_ = 0, neurons_ = 0;
  MatrixAttributes up_, down_;
  float threshold_ = 0;
  int64_t activation_bits_ = 0;
  std::string isa_;  // empty: the fastest
  const relu2::Kernels* kernels_ = nullptr;
};

// Inputs: activations f32 [..., inputs]; the packed weights of each matrix (UP layout), u8 [bytes].
// Outputs: f32 [..., outputs] of each matrix. `Base` is what the rest of OpenVINO takes the operation for.
template <class Base>
class Packed : public Base {
 public:
  void validate_and_infer_types() override;
  bool visit_attributes(ov::AttributeVisitor& visitor) override;
  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
  bool has_evaluate() const override { return true; }

 private:
  relu2::UpMatrix matrix(size_t i) const;

  int64_t inputs_ = 0;
  std::vector<int64_t> outputs_;
  MatrixAttributes weights_;
  int64_t activation_bits_ = 0;
  std::string isa_;  // empty: the fastest
  const relu2::Kernels* kernels_ = nullptr;
};

class PackedLinear : public Packed<ov::op::Op> {
 public:
  OPENVINO_OP("PackedLinear", "ov_afm");

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
};

// The head, one matrix. GenAI computes logits only for the tokens that it samples: it looks for a MatMul before the
// result and picks rows of its first input. The weights are given twice, because passes that rewrite a MatMul match one
// of two inputs.
class PackedHead : public Packed<ov::op::v0::MatMul> {
 public:
  OPENVINO_OP("PackedHead", "ov_afm", ov::op::v0::MatMul);

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
};

}  // namespace ov_afm
