"""Parts of the offline recognition benchmark (:mod:`benchmarks.asr_offline`)."""
