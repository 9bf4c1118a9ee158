"""What only tests use: trees and tables of their own, hooks into the state of compiled modules."""
