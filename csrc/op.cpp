// The OpenVINO side: operations "ReLU2FFN", "PackedLinear" and "PackedHead" of ov_afm, for any number of tokens.
#include "op.h"

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <type_traits>

namespace ov_afm {
namespace {

void check(const ov::Node* node, const MatrixAttributes& m, const char* name) {
  NODE_VALIDATION_CHECK(node, m.bits == 4 || m.bits == 8, name, " weights have 4 or 8 bits, found ", m.bits);
  NODE_VALIDATION_CHECK(node, m.group == 32 || m.group == 64 || m.group == 128 || m.group == -1, name,
                        " group size must be 32, 64, 128 or -1, found ", m.group);
}

// The activations' shape, whose last dimension must be `features`.
ov::PartialShape activations(const ov::Node* node, int64_t activation_bits, int64_t features) {
  NODE_VALIDATION_CHECK(node, activation_bits == 0 || activation_bits == 8 || activation_bits == 16,
                        "activation_bits must be 0 (automatic), 8 or 16, found ", activation_bits);
  NODE_VALIDATION_CHECK(node, node->get_input_element_type(0) == ov::element::f32, "activations must be f32, found ",
                        node->get_input_element_type(0));
  const ov::PartialShape shape = node->get_input_partial_shape(0);
  NODE_VALIDATION_CHECK(node, shape.rank().is_static() && shape.size() > 0, "activations need a rank");
  ov::Dimension last;
  NODE_VALIDATION_CHECK(node, ov::Dimension::merge(last, shape[shape.size() - 1], features), "activations have ",
                        shape[shape.size() - 1], " features where the weights have ", features);
  return shape;
}

void check_bytes(const ov::Node* node, size_t input, size_t expected) {
  const ov::PartialShape& shape = node->get_input_partial_shape(input);
  NODE_VALIDATION_CHECK(node, shape == ov::PartialShape({int64_t(expected)}),
                        "packed weights are damaged: ", shape, " bytes where ", expected, " are expected");
}

const relu2::Kernels* kernels_for(const ov::Node* node, const std::string& isa) {
  const relu2::Kernels* kernels = relu2::kernels_by_name(isa.empty() ? nullptr : isa.c_str());
  NODE_VALIDATION_CHECK(node, kernels, "this CPU or this build has no kernels named ", isa);
  return kernels;
}

void fill(relu2::Matrix& m, const MatrixAttributes& a, int64_t inputs, int64_t outputs, const void* data) {
  m.data = static_cast<const uint8_t*>(data);
  m.inputs = static_cast<size_t>(inputs), m.outputs = static_cast<size_t>(outputs);
  m.bits = static_cast<int>(a.bits), m.asymmetric = a.asymmetric;
}

template <class Node>
std::shared_ptr<ov::Node> copy_of(const Node& node, const ov::OutputVector& inputs) {
  auto copy = std::make_shared<Node>(node);
  copy->set_arguments(inputs);
  copy->validate_and_infer_types();
  return copy;
}

}  // namespace

ReLU2FFN::ReLU2FFN(const ov::OutputVector& inputs) : Op(inputs) {
  constructor_validate_and_infer_types();
}

void ReLU2FFN::validate_and_infer_types() {
  NODE_VALIDATION_CHECK(this, get_input_size() == 3, "ReLU2FFN takes activations, UP and DOWN weights");
  check(this, up_, "UP");
  check(this, down_, "DOWN");
  NODE_VALIDATION_CHECK(this, hidden_ > 0 && neurons_ > 0, "sizes must be positive");
  ov::PartialShape shape = activations(this, activation_bits_, hidden_);
  kernels_ = kernels_for(this, isa_);
  const relu2::Ffn ffn = view(nullptr, nullptr);
  check_bytes(this, 1, ffn.up.bytes());
  check_bytes(this, 2, ffn.down.bytes());
  shape[shape.size() - 1] = hidden_;
  set_output_type(0, ov::element::f32, shape);
}

std::shared_ptr<ov::Node> ReLU2FFN::clone_with_new_inputs(const ov::OutputVector& inputs) const {
  return copy_of(*this, inputs);
}

bool ReLU2FFN::visit_attributes(ov::AttributeVisitor& visitor) {
  visitor.on_attribute("hidden", hidden_);
  visitor.on_attribute("neurons", neurons_);
  visitor.on_attribute("up_bits", up_.bits);
  visitor.on_attribute("up_group", up_.group);
  visitor.on_attribute("up_asymmetric", up_.asymmetric);
  visitor.on_attribute("down_bits", down_.bits);
  visitor.on_attribute("down_group", down_.group);
  visitor.on_attribute("down_asymmetric", down_.asymmetric);
  visitor.on_attribute("threshold", threshold_);
  visitor.on_attribute("activation_bits", activation_bits_);
  visitor.on_attribute("isa", isa_);
  return true;
}

relu2::Ffn ReLU2FFN::view(const void* up, const void* down) const {
  relu2::Ffn ffn;
  fill(ffn.up, up_, hidden_, neurons_, up);
  fill(ffn.down, down_, neurons_, hidden_, down);
  ffn.up.group = up_.group > 0 ? static_cast<size_t>(up_.group) : ffn.up.padded_inputs();
  ffn.down.group = down_.group > 0 ? static_cast<size_t>(down_.group) : relu2::kMaxGroup;
  ffn.threshold = threshold_;
  ffn.activation_bits = static_cast<int>(activation_bits_);
  return ffn;
}

bool ReLU2FFN::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
  const ov::Shape& shape = inputs[0].get_shape();
  outputs[0].set_shape(shape);
  const relu2::Ffn ffn = view(inputs[1].data(), inputs[2].data());
  OPENVINO_ASSERT(inputs[1].get_byte_size() == ffn.up.bytes() && inputs[2].get_byte_size() == ffn.down.bytes(),
                  "packed weights of ", get_friendly_name(), " are damaged");
  OPENVINO_ASSERT(shape.back() == ffn.up.inputs, get_friendly_name(), ": wrong number of features");
  const size_t tokens = ov::shape_size(shape) / shape.back();
  relu2::run(*kernels_, ffn, inputs[0].data<const float>(), tokens, outputs[0].data<float>());
  return true;
}

template <class Base>
void Packed<Base>::validate_and_infer_types() {
  const size_t times = std::is_base_of_v<ov::op::v0::MatMul, Base> ? 2 : 1;  // op.h says why
  NODE_VALIDATION_CHECK(this, !outputs_.empty() && this->get_input_size() == times * outputs_.size() + 1,
                        this->get_type_name(), " takes activations and the weights of ", outputs_.size(),
                        " matrices, found ", this->get_input_size(), " inputs");
  check(this, weights_, "packed");
  NODE_VALIDATION_CHECK(this, inputs_ > 0, "sizes must be positive");
  ov::PartialShape shape = activations(this, activation_bits_, inputs_);
  kernels_ = kernels_for(this, isa_);
  this->set_output_size(outputs_.size());
  for (size_t i = 0; i < outputs_.size(); i++) {
    NODE_VALIDATION_CHECK(this, outputs_[i] > 0, "sizes must be positive");
    check_bytes(this, i + 1, matrix(i).bytes());
    shape[shape.size() - 1] = outputs_[i];
    this->set_output_type(i, ov::element::f32, shape);
  }
}

template <class Base>
bool Packed<Base>::visit_attributes(ov::AttributeVisitor& visitor) {
  visitor.on_attribute("inputs", inputs_);
  visitor.on_attribute("outputs", outputs_);
  visitor.on_attribute("bits", weights_.bits);
  visitor.on_attribute("group", weights_.group);
  visitor.on_attribute("asymmetric", weights_.asymmetric);
  visitor.on_attribute("activation_bits", activation_bits_);
  visitor.on_attribute("isa", isa_);
  return true;
}

template <class Base>
relu2::UpMatrix Packed<Base>::matrix(size_t i) const {
  relu2::UpMatrix m;
  fill(m, weights_, inputs_, outputs_[i], nullptr);
  m.group = weights_.group > 0 ? static_cast<size_t>(weights_.group) : m.padded_inputs();
  return m;
}

template <class Base>
bool Packed<Base>::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
  ov::Shape shape = inputs[0].get_shape();
  OPENVINO_ASSERT(shape.back() == static_cast<size_t>(inputs_), this->get_friendly_name(),
                  ": wrong number of features");
  const size_t tokens = ov::shape_size(shape) / shape.back();
  relu2::Linear linear;
  linear.activation_bits = static_cast<int>(activation_bits_);
  std::vector<float*> to;
  for (size_t i = 0; i < outputs_.size(); i++) {
    linear.matrices.push_back(matrix(i));
    OPENVINO_ASSERT(inputs[i + 1].get_byte_size() == linear.matrices[i].bytes(), "packed weights of ",
                    this->get_friendly_name(), " are damaged");
    linear.matrices[i].data = static_cast<const uint8_t*>(inputs[i + 1].data());
    shape.back() = static_cast<size_t>(outputs_[i]);
    outputs[i].set_shape(shape);
    to.push_back(outputs[i].data<float>());
  }
  relu2::run(*kernels_, linear, inputs[0].data<const float>(), tokens, to);
  return true;
}

std::shared_ptr<ov::Node> PackedLinear::clone_with_new_inputs(const ov::OutputVector& inputs) const {
  return copy_of(*this, inputs);
}

std::shared_ptr<ov::Node> PackedHead::clone_with_new_inputs(const ov::OutputVector& inputs) const {
  return copy_of(*this, inputs);
}

}  // namespace ov_afm

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<ov_afm::ReLU2FFN>>(),
                                                            std::make_shared<ov::OpExtension<ov_afm::PackedLinear>>(),
                                                            std::make_shared<ov::OpExtension<ov_afm::PackedHead>>()}));

#if defined(_MSC_VER)
#define RELU2_EXPORT __declspec(dllexport)
#else
#define RELU2_EXPORT __attribute__((visibility("default")))
#endif

// Changes with operations, their attributes and the layout of weights; extension.py has the same number.
extern "C" RELU2_EXPORT int ov_afm_interface() {
  return 2;
}
// Name of the kernels that this CPU gets, and whether it has those of a given name.
extern "C" RELU2_EXPORT const char* ov_afm_best_isa() {
  return relu2::best_kernels().name;
}
extern "C" RELU2_EXPORT int ov_afm_has_isa(const char* name) {
  return relu2::kernels_by_name(name) != nullptr;
}
