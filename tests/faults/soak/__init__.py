"""Parts of ``benchmarks/soak.py``: a run over many tiny images while its processes are killed."""
