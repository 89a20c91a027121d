"""`student-train eval`: how a student does on rows it has not learnt from.

Three looks, each of them optional: measures of its distribution (`student_train.evaluate`), exact match of what it
writes by itself (`generation`, `answers`, `exact_match`), and the tasks of lm-eval (`harness`).
"""
