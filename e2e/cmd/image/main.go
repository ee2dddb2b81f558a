// Command image makes Tacit's images as OCI tars, which registry clients push and
// container runtimes import.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"tacit.dev/e2e/product"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	o := product.Options{Progress: os.Stdout}
	f := flag.NewFlagSet("image", flag.ContinueOnError)
	f.StringVar(&o.Registry, "registry", "", "what comes before the images' names")
	f.StringVar(&o.Version, "version", "unknown", "the images' tag")
	f.StringVar(&o.Revision, "revision", "", "the commit that is built")
	to := f.String("to", ".", "`folder` of the tars")
	if err := f.Parse(args); err != nil {
		return err
	}
	made, err := product.Build(ctx, o)
	if err != nil {
		return err
	}
	for name, tar := range map[string]string{"tacit-node": made.Node, "tacit-control": made.Control} {
		file := filepath.Join(*to, name+".tar")
		if err := copyFile(tar, file); err != nil {
			return err
		}
		fmt.Println(o.Reference(name), "is in", file)
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
