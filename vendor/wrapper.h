/* What bindgen reads: ggml's and llama.cpp's public headers, and the row functions of ggml-quants.c,
 * which are exported but not in a public header. Blocks are plain bytes to us. */

#include <ggml.h>
#include <ggml-cpu.h>
#include <gguf.h>
#include <llama.h>

/* quantize_row_*_ref: without importance. quantize_*: rows, with importance or (NULL) without. */
#define ROW_FUNCTIONS(type)                                                                       \
    void   quantize_row_##type##_ref(const float * weights, void * blocks, int64_t n);           \
    void   dequantize_row_##type(const void * blocks, float * weights, int64_t n);               \
    size_t quantize_##type(const float * weights, void * blocks, int64_t rows, int64_t columns,  \
                           const float * importance);

ROW_FUNCTIONS(q4_0)
ROW_FUNCTIONS(q4_1)
ROW_FUNCTIONS(q5_0)
ROW_FUNCTIONS(q5_1)
ROW_FUNCTIONS(q8_0)
ROW_FUNCTIONS(q2_K)
ROW_FUNCTIONS(q3_K)
ROW_FUNCTIONS(q4_K)
ROW_FUNCTIONS(q5_K)
ROW_FUNCTIONS(q6_K)
ROW_FUNCTIONS(iq4_nl)
ROW_FUNCTIONS(iq4_xs)
ROW_FUNCTIONS(mxfp4)

/* shim.c: from now on llama.cpp and ggml log errors only. */
void ggml_bindings_log_errors_only(void);
