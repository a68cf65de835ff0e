"""Many runs side by side: a table, pictures, and the scaling law through them. No torch here."""
