"""Tables, engine, migrations and every SQL statement of Bitplan."""
