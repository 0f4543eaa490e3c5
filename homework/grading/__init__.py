"""Graded homework: derive what students receive, grade what they hand in. `course.py homework` is the way in."""
