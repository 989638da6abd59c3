#pragma once
// Reverse-mode differentiation on a tape. An op computes its output, and, when a gradient will be asked for, records one closure
// that turns the output's gradient into those of its inputs. backward() runs the closures in reverse order and destroys each one
// as soon as it has run, so what it kept (activations) is released as backward passes it.
//
// A Var is a value and, when it needs a gradient, a slot for it. Closures keep slots and just the values they need, never Vars;
// values that are cheap to make again are not kept either (Rebuild), with the same bits.
// Nothing is recorded for an output that needs no gradient: frozen weights under inputs without gradient cost nothing.
// Losses (autograd/ops.h) are the roots: they put their own gradient into their input, so backward() takes no argument.
// Gradients of parameters go straight into Parameter::grad. A tape is used by one thread, once.

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "autograd/parameter.h"
#include "runtime/tensor.h"

namespace lightmoe {

// Gradient of one activation while backward runs. The first contribution is stored, later ones are added.
class GradSlot {
 public:
  // Memory for a product that can write '=' or '+=': *accumulate tells which. Never shared with another slot.
  Tensor target(const Shape& shape, DType dtype, bool* accumulate);
  void add(const Tensor& fresh);    // nobody else may hold `fresh`: it is kept or overwritten
  void share(const Tensor& other);  // read-only: may be held by other slots too
  Tensor take();                    // undefined when nothing was added
  const Tensor& value() const { return value_; }

 private:
  Tensor value_;
  bool shared_ = false;
};
using GradPtr = std::shared_ptr<GradSlot>;

// How to make a cheap output again (norms, clamps, rotations: one pass over memory), so that backward need not keep it.
class Rebuild {
 public:
  explicit Rebuild(std::function<Tensor()> make) : make_(std::move(make)) {}
  Tensor fresh() const { return make_(); }
  // Made once, then shared until the last closure that asks is gone.
  Tensor get() {
    if (!made_.defined()) made_ = make_();
    return made_;
  }

 private:
  std::function<Tensor()> make_;
  Tensor made_;
};

struct Var {
  Tensor value;
  GradPtr grad;                      // null = needs no gradient
  std::shared_ptr<Rebuild> rebuild;  // null = closures keep the value itself
  bool needs_grad() const { return grad != nullptr; }
};

// What a closure keeps of an input whose value its backward reads.
class Saved {
 public:
  Saved() = default;
  explicit Saved(const Var& x) : value_(x.rebuild ? Tensor() : x.value), rebuild_(x.rebuild) {}
  Tensor get() const { return rebuild_ ? rebuild_->get() : value_; }
  const std::shared_ptr<Rebuild>& rebuild() const { return rebuild_; }

 private:
  Tensor value_;
  std::shared_ptr<Rebuild> rebuild_;
};

class Tape {
 public:
  explicit Tape(bool recording = true) : recording_(recording) {}
  bool recording() const { return recording_; }

  static Var constant(Tensor value) { return {std::move(value), nullptr, nullptr}; }
  static Var variable(Tensor value) { return {std::move(value), std::make_shared<GradSlot>(), nullptr}; }
  // Output of an op: needs a gradient when one of its inputs or weights does.
  static Var output(Tensor value, bool needs_grad) {
    return needs_grad ? variable(std::move(value)) : constant(std::move(value));
  }
  // True when an op with this output should keep what its backward needs.
  bool wants(const Var& output) const { return recording_ && output.needs_grad(); }

  // Backward of one output: called with its gradient, not called when there is none.
  void record(const Var& output, std::function<void(const Tensor& dy)> backward);
  void record(std::function<void()> backward);

  using Function = std::function<std::vector<Var>(Tape&, const std::vector<Var>&)>;
  // Recomputation: runs f without recording and keeps the inputs alone; backward runs f again, recorded, and goes through it.
  // f must be a pure function of the inputs and of parameters. Results are the same bits as f recorded directly.
  std::vector<Var> checkpoint(const std::vector<Var>& inputs, Function f);

  void backward();
  size_t size() const { return closures_.size(); }

 private:
  bool recording_;
  std::vector<std::function<void()>> closures_;
};

}  // namespace lightmoe
