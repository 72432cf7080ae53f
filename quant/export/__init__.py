"""What a plan becomes for each consumer: files, the rules they obey, and reading them back."""
