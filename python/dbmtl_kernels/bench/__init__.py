"""``python -m dbmtl_kernels bench``: what balancing costs on this machine, against what one would write oneself.

Uses the public interface and the ops, as a stranger's benchmark would; nothing else imports it. Rows of every benchmark
of the project have the schema of `results`.
"""
