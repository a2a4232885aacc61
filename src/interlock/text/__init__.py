"""Between text and token ids: tokenizer, chat template, incremental text of a stream, stop strings. No engine, no network."""
