"""The course: roadmap, briefs, quizzes, cards, progress. Reads what runs left behind; nothing here imports torch."""
