"""The commands for a running server: `apphost status`, `reload`, `stop` and so on. Imported only when one is used."""
