#include "compress/stage_keys.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "compress/weights.h"
#include "loaders/json.h"
#include "loaders/output.h"

namespace lightmoe {
namespace {

constexpr int kStageVersion = 2;  // raised when a stage computes something else

}  // namespace

std::string key_of(Json parts) {
  parts["stages"] = kStageVersion;
  const std::string text = parts.dump();
  return hash_bytes(text.data(), text.size());
}

bool is_done(const std::filesystem::path& key_file, const std::string& key) {
  return std::filesystem::exists(key_file) && read_file(key_file, 1024) == key + "\n";
}

// NOTE: settings that came after the first results stand in a key only where they are used, so that those results remain.
Json to_json(const RecipeTraining& t) {
  Json json = {{"steps", t.steps},
               {"rows", t.rows},
               {"length", t.length},
               {"accumulate", t.accumulate},
               {"pack", t.pack},
               {"lr", t.lr},
               {"schedule", t.schedule},
               {"warmup", t.warmup},
               {"min_lr_ratio", t.min_lr_ratio},
               {"weight_decay", t.weight_decay},
               {"clip", t.clip},
               {"aux_coef", t.aux_coef},
               {"betas", {t.beta1, t.beta2}},
               {"anneal", t.anneal ? Json(*t.anneal) : Json(nullptr)},
               {"anneal_shape", t.anneal_shape},
               {"anneal_gamma", t.anneal_gamma},
               {"merge", t.merge},
               {"eval_every", t.eval_every}};
  if (t.entropy_coef != 0) json["entropy_coef"] = t.entropy_coef;
  if (t.distill > 0 || t.router_kd) json["distill"] = {t.distill, t.distill_temperature};
  if (t.router_kd) json["router_kd"] = true;
  if (!t.extend.empty()) json["extend"] = t.extend;
  return json;
}

Json to_json(const MethodOptions& o) {
  Json json = {{"budget", describe(o.budget)},
               {"bases", o.bases},
               {"rank", o.rank},
               {"method_rank", o.method_rank},
               {"rule", static_cast<int>(o.selection.rule)},
               {"alpha", o.selection.alpha},
               {"clip", o.selection.clip},
               {"starved", static_cast<int>(o.selection.starved)},
               {"init", name_of(o.adapter_init)},
               {"std", o.adapter_std},
               {"seed", o.seed}};
  if (o.selection.importance != Importance::kGate) json["importance"] = name_of(o.selection.importance);
  if (o.rank_allocation != RankAllocation::kEqual) json["rank_allocation"] = name_of(o.rank_allocation);
  if (o.redirect) json["redirect"] = true;
  if (o.align) json["align"] = true;
  if (o.refit) json["refit"] = true;
  if (const LatentOptions& l = o.latent; l != LatentOptions{}) {
    json["latent"] = {l.size, l.group, l.bases, l.down, l.fit_steps};
  }
  return json;
}

StageLock::StageLock(const std::filesystem::path& file)
    : file_(::open(file.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644)) {
  check(file_ >= 0 && ::flock(file_, LOCK_EX) == 0, ErrorKind::kIo, "{}: cannot be locked: {}", file.string(),
        std::strerror(errno));
}
StageLock::~StageLock() { ::close(file_); }

}  // namespace lightmoe
