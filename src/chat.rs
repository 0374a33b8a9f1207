//! Conversations: messages, the file's chat template, fallbacks by name.
