"""All statements: each module holds the functions of one table, taking a Session, giving frozen records."""
