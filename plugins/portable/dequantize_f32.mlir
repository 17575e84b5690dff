// Weights that are float32 already.
util.func private @$name(%w: $w) -> $weights {
  util.return %w : $weights
}
