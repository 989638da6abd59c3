#include "autograd/tape.h"

#include "kernels/elementwise.h"

namespace lightmoe {

Tensor GradSlot::target(const Shape& shape, DType dtype, bool* accumulate) {
  *accumulate = value_.defined();
  if (!value_.defined()) {
    value_ = Tensor::empty(shape, dtype);
  } else if (shared_) {
    value_ = value_.clone();
  }
  shared_ = false;
  return value_;
}

void GradSlot::add(const Tensor& fresh) {
  if (value_.defined()) run(Add{.a = value_, .b = fresh, .y = fresh});
  value_ = fresh;
  shared_ = false;
}

void GradSlot::share(const Tensor& other) {
  if (value_.defined()) {
    const Tensor sum = Tensor::empty(other.shape(), other.dtype());
    run(Add{.a = value_, .b = other, .y = sum});
    value_ = sum;
    shared_ = false;
  } else {
    value_ = other;
    shared_ = true;
  }
}

Tensor GradSlot::take() {
  Tensor taken = std::move(value_);
  value_.reset();
  shared_ = false;
  return taken;
}

void Tape::record(std::function<void()> backward) {
  if (recording_) closures_.push_back(std::move(backward));
}

void Tape::record(const Var& output, std::function<void(const Tensor& dy)> backward) {
  if (!wants(output)) return;
  record([slot = output.grad, backward = std::move(backward)] {
    const Tensor dy = slot->take();
    if (dy.defined()) backward(dy);
  });
}

std::vector<Var> Tape::checkpoint(const std::vector<Var>& inputs, Function f) {
  if (!recording_) return f(*this, inputs);
  std::vector<Var> outputs;
  {
    Tape unrecorded(false);
    outputs = f(unrecorded, inputs);
  }
  struct Input {
    Saved value;
    GradPtr grad;
  };
  std::vector<Input> kept;
  for (const Var& input : inputs) kept.push_back({Saved(input), input.grad});
  std::vector<GradPtr> slots;
  bool any = false;
  for (const Var& output : outputs) {
    slots.push_back(output.grad);
    any = any || output.needs_grad();
  }
  if (any) {
    record([kept = std::move(kept), slots = std::move(slots), f = std::move(f)] {
      Tape again;
      std::vector<Var> inputs;
      for (const Input& input : kept) inputs.push_back({input.value.get(), input.grad, input.value.rebuild()});
      std::vector<Var> outputs = f(again, inputs);
      for (size_t i = 0; i < outputs.size(); ++i) {
        if (slots[i] == nullptr) continue;
        const Tensor dy = slots[i]->take();
        if (dy.defined()) outputs[i].grad->share(dy);
      }
      inputs.clear();
      outputs.clear();
      again.backward();
    });
  }
  return outputs;
}

void Tape::backward() {
  while (!closures_.empty()) {
    const std::function<void()> closure = std::move(closures_.back());
    closures_.pop_back();
    closure();
  }
}

}  // namespace lightmoe
