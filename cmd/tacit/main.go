// Command tacit is Tacit for people: so far, the lab.
package main

import (
	"os"

	"tacit.dev/cli"
)

// version is set by the linker.
var version = "unknown"

func main() { os.Exit(cli.Main(version, os.Args[1:])) }
