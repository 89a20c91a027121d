"""`student-train rollout`: offline on-policy distillation (arXiv 2509.26497, 2605.05940), its first half.

The student answers prompts, and what it wrote is written down: exact token ids, marked by a verifier, without what is
cut or extreme.  `teacher-dump run` scores these files as ready tokens, and the next stage trains on that dataset.

    rows ──► prompts ──► units of prompts ──► student ──► marks, filters ──► data/part-….jsonl, dropped/part-….jsonl
"""
