"""The report: one page that shows what a catalog holds, and what plans do to it."""
