"""What is trained and on what: the built-in decoder, its profile, corpora, token files, the sampler.

`corpus`, `tokens`, `sampler` and `profile` need no torch, so that a driver can plan a job and prepare its
data without importing it; `decoder`, `stage` and `measure` do. May import only `errors`, `config` and the
scheduler's profile types.
"""
