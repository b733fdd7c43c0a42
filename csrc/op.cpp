// The OpenVINO side: operation "ov_afm::ReLU2FFN", one MLP for any number of tokens.
#include "op.h"

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>

namespace ov_afm {

ReLU2FFN::ReLU2FFN(const ov::OutputVector& inputs) : Op(inputs) {
  constructor_validate_and_infer_types();
}

void ReLU2FFN::validate_and_infer_types() {
  NODE_VALIDATION_CHECK(this, get_input_size() == 3, "ReLU2FFN takes activations, UP and DOWN weights");
  const auto check = [&](const MatrixAttributes& m, const char* name) {
    NODE_VALIDATION_CHECK(this, m.bits == 4 || m.bits == 8, name, " weights have 4 or 8 bits, found ", m.bits);
    NODE_VALIDATION_CHECK(this, m.group == 32 || m.group == 64 || m.group == 128 || m.group == -1, name,
                          " group size must be 32, 64, 128 or -1, found ", m.group);
  };
  check(up_, "UP");
  check(down_, "DOWN");
  NODE_VALIDATION_CHECK(this, hidden_ > 0 && neurons_ > 0, "sizes must be positive");
  NODE_VALIDATION_CHECK(this, activation_bits_ == 0 || activation_bits_ == 8 || activation_bits_ == 16,
                        "activation_bits must be 0 (automatic), 8 or 16, found ", activation_bits_);
  kernels_ = relu2::kernels_by_name(isa_.empty() ? nullptr : isa_.c_str());
  NODE_VALIDATION_CHECK(this, kernels_, "this CPU or this build has no kernels named ", isa_);
  NODE_VALIDATION_CHECK(this, get_input_element_type(0) == ov::element::f32, "activations must be f32, found ",
                        get_input_element_type(0));
  ov::PartialShape shape = get_input_partial_shape(0);
  NODE_VALIDATION_CHECK(this, shape.rank().is_static() && shape.size() > 0, "activations need a rank");
  ov::Dimension last;
  NODE_VALIDATION_CHECK(this, ov::Dimension::merge(last, shape[shape.size() - 1], hidden_), "activations have ",
                        shape[shape.size() - 1], " features where the weights have ", hidden_);
  const relu2::Ffn ffn = view(nullptr, nullptr);
  const size_t expected[] = {ffn.up.bytes(), ffn.down.bytes()};
  for (size_t i = 0; i < 2; i++)
    NODE_VALIDATION_CHECK(this, get_input_partial_shape(i + 1) == ov::PartialShape({int64_t(expected[i])}),
                          "packed weights are damaged: ", get_input_partial_shape(i + 1), " bytes where ", expected[i],
                          " are expected");
  shape[shape.size() - 1] = hidden_;
  set_output_type(0, ov::element::f32, shape);
}

std::shared_ptr<ov::Node> ReLU2FFN::clone_with_new_inputs(const ov::OutputVector& inputs) const {
  check_new_args_count(this, inputs);
  auto copy = std::make_shared<ReLU2FFN>(*this);
  copy->set_arguments(inputs);
  copy->validate_and_infer_types();
  return copy;
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
  const auto fill = [](relu2::Matrix& m, const MatrixAttributes& a, int64_t inputs, int64_t outputs) {
    m.inputs = static_cast<size_t>(inputs), m.outputs = static_cast<size_t>(outputs);
    m.bits = static_cast<int>(a.bits), m.asymmetric = a.asymmetric;
  };
  fill(ffn.up, up_, hidden_, neurons_);
  fill(ffn.down, down_, neurons_, hidden_);
  ffn.up.group = up_.group > 0 ? static_cast<size_t>(up_.group) : ffn.up.padded_inputs();
  ffn.down.group = down_.group > 0 ? static_cast<size_t>(down_.group) : relu2::kMaxGroup;
  ffn.up.data = static_cast<const uint8_t*>(up);
  ffn.down.data = static_cast<const uint8_t*>(down);
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

}  // namespace ov_afm

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<ov_afm::ReLU2FFN>>()}));

#if defined(_MSC_VER)
#define RELU2_EXPORT __declspec(dllexport)
#else
#define RELU2_EXPORT __attribute__((visibility("default")))
#endif

// Name of the kernels that this CPU gets, and whether it has those of a given name.
extern "C" RELU2_EXPORT const char* ov_afm_best_isa() {
  return relu2::best_kernels().name;
}
extern "C" RELU2_EXPORT int ov_afm_has_isa(const char* name) {
  return relu2::kernels_by_name(name) != nullptr;
}
