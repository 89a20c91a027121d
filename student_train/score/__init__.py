"""`student-train score`: how hard each row is for the student as it is now, for a curriculum.

rows ──► student's −log p of the labels ─┐
rollouts ──► share that is right ────────┴─► scores.jsonl ──► data.curriculum.scores
"""
