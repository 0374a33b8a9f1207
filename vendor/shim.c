/* llama.cpp prints a page of figures for every model that it loads. Tests want its errors only. */

#include <stdbool.h>
#include <stdio.h>

#include "wrapper.h"

static void log_errors(enum ggml_log_level level, const char * text, void * user_data) {
    static _Thread_local bool last_was_error = false;
    (void) user_data;
    /* A line may come in pieces; the later ones are marked as its continuation. */
    if (level != GGML_LOG_LEVEL_CONT) {
        last_was_error = level == GGML_LOG_LEVEL_ERROR;
    }
    if (last_was_error) {
        fputs(text, stderr);
    }
}

void ggml_bindings_log_errors_only(void) {
    llama_log_set(log_errors, NULL); /* sets ggml's, too */
    ggml_log_set(log_errors, NULL);
}
