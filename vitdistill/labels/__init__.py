"""The label store: a teacher's answers, written once and read for ever."""
