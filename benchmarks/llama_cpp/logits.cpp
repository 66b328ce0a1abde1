// Answers requests for logits of one GGUF model: the reading side of the quality comparison.
// Usage: logits MODEL CONTEXT_TOKENS THREADS KV_TYPE, KV_TYPE being f16 (llama.cpp's default) or f32.
// Writes the vocabulary's size (int32) at once. A request on stdin is int32 {restart, count, wanted} and
// `count` token ids; where `wanted` is 1 the answer is float32 (count, vocabulary). Ends with stdin.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "llama.h"

namespace {

struct Request {
  int32_t restart, count, wanted;
};

void log_errors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

int fail(const char* what) {
  std::fprintf(stderr, "error: %s\n", what);
  return 1;
}

// One token after another at its position in the sequence; the batch is reused between requests.
void fill(llama_batch& batch, const std::vector<int32_t>& tokens, int32_t position, bool wanted) {
  batch.n_tokens = static_cast<int32_t>(tokens.size());
  for (int32_t i = 0; i < batch.n_tokens; ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = position + i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = wanted;
  }
}

int serve(llama_context* context, int32_t vocab, int32_t limit) {
  std::fwrite(&vocab, sizeof vocab, 1, stdout);
  std::fflush(stdout);
  llama_batch batch = llama_batch_init(limit, 0, 1);
  int32_t position = 0;
  for (Request request; std::fread(&request, sizeof request, 1, stdin) == 1;) {
    if (request.restart) {
      llama_memory_clear(llama_get_memory(context), true);
      position = 0;
    }
    if (request.count < 1 || request.count > limit - position) return fail("a request exceeds the context");
    std::vector<int32_t> tokens(request.count);
    if (std::fread(tokens.data(), sizeof(int32_t), tokens.size(), stdin) != tokens.size()) {
      return fail("a request ends early");
    }
    fill(batch, tokens, position, request.wanted != 0);
    if (llama_decode(context, batch) != 0) return fail("llama_decode refused a batch");
    position += request.count;
    for (int32_t i = 0; request.wanted && i < request.count; ++i) {
      std::fwrite(llama_get_logits_ith(context, i), sizeof(float), vocab, stdout);
    }
    std::fflush(stdout);
  }
  llama_batch_free(batch);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return fail("usage: logits MODEL CONTEXT_TOKENS THREADS KV_TYPE");
  const int32_t limit = std::atoi(argv[2]);
  llama_log_set(log_errors, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (!model) return fail("the model cannot be loaded");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = static_cast<uint32_t>(limit);
  params.n_threads = params.n_threads_batch = std::atoi(argv[3]);
  if (std::strcmp(argv[4], "f32") == 0) {
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // its kernel keeps values in float16
  }
  llama_context* context = llama_init_from_model(model, params);
  if (!context) return fail("the context cannot be made");
  const int status = serve(context, llama_vocab_n_tokens(llama_model_get_vocab(model)), limit);
  llama_free(context);
  llama_model_free(model);
  llama_backend_free();
  return status;
}
