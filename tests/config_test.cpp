#include "model/config.h"

#include "loaders/json.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::get_file;
using testing::put_file;
using testing::TempDir;

TEST(Config, ReadsGolden) {
  const OlmoeConfig c = read_config("tests/golden/gqa-clip-renorm");
  EXPECT_EQ(c.hidden_size, 48);
  EXPECT_EQ(c.intermediate_size, 40);
  EXPECT_EQ(c.num_heads, 6);
  EXPECT_EQ(c.num_kv_heads, 3);
  EXPECT_EQ(c.num_experts, 12);
  EXPECT_EQ(c.num_experts_per_token, 3);
  EXPECT_EQ(c.clip_qkv, 0.7);
  EXPECT_TRUE(c.norm_topk_prob);
  EXPECT_EQ(c.rope_theta, 20000);
  EXPECT_EQ(c.rms_norm_eps, 1e-6);
  EXPECT_EQ(c.eos_token_ids, std::vector<int64_t>{3});
  EXPECT_EQ(c.pad_token_id, 1);
  EXPECT_FALSE(c.bos_token_id.has_value());
}

}  // namespace
}  // namespace lightmoe
