"""From stored scores to plans: what is asked, the problem, the answer. No torch, no database."""
