package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

const (
	maxSentence = 64 << 10
	// maxAsking bounds how many plugins are answered at once; a node starts far
	// fewer pods than that in one moment. More wait in the socket's backlog.
	maxAsking = 256
	ioTimeout = 5 * time.Second
)

// Ask sends r to the agent at path and waits for the answer, until ctx ends. The
// form is JSON, one object each way, ended by closing the direction.
func Ask(ctx context.Context, path string, r Request) (Answer, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return Answer{}, err
	}
	defer nc.Close()
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := writeJSON(nc, r); err != nil {
		return Answer{}, fmt.Errorf("ask the agent at %s: %w", path, err)
	}
	var a Answer
	if err := readJSON(nc, &a); err != nil {
		return Answer{}, fmt.Errorf("answer of the agent at %s: %w", path, errors.Join(err, context.Cause(ctx)))
	}
	return a, nil
}

func writeJSON(c net.Conn, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	return c.(*net.UnixConn).CloseWrite()
}

func readJSON(r io.Reader, v any) error {
	b, err := io.ReadAll(io.LimitReader(r, maxSentence+1))
	if err != nil {
		return err
	}
	if len(b) == 0 {
		return io.ErrUnexpectedEOF
	}
	if len(b) > maxSentence {
		return fmt.Errorf("more than %d bytes", maxSentence)
	}
	return json.Unmarshal(b, v)
}

// Listen makes the agent's socket at path, for root only, in place of one that
// an earlier agent left.
func Listen(path string) (*net.UnixListener, error) {
	// Made aside and renamed: there is no moment with the wrong mode.
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen for tacit-cni: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for tacit-cni: %w", err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(tmp, 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for tacit-cni at %s: %w", path, err)
	}
	return l, nil
}

// Serve answers plugins by handle until ctx ends, and returns when all are
// answered. handle is called by many goroutines at once, with a context that
// ends with the request's patience; a nil error is yes. Serve closes l.
func Serve(ctx context.Context, l *net.UnixListener, handle func(context.Context, Request) error) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	free := make(chan struct{}, maxAsking)
	for {
		free <- struct{}{}
		c, err := l.AcceptUnix()
		if err != nil && ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept tacit-cni: %w", err)
		}
		wg.Go(func() {
			defer func() { <-free }()
			serveOne(ctx, c, handle)
		})
	}
}

// serveOne answers one plugin. A request that cannot be read gets no answer,
// which its ADD takes for no.
func serveOne(ctx context.Context, c *net.UnixConn, handle func(context.Context, Request) error) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(ioTimeout))
	var r Request
	if err := readJSON(c, &r); err != nil {
		return
	}
	var a Answer
	if err := r.Validate(); err != nil {
		a.Error = fault(CodeEnv, "the request is incomplete", err)
	} else {
		ctx, cancel := context.WithTimeout(ctx, r.Patience())
		defer cancel()
		a.Error = asError(handle(ctx, r))
	}
	c.SetDeadline(time.Now().Add(ioTimeout))
	_ = writeJSON(c, a) // a plugin that has given up hears nothing
}

// asError makes err a CNI error; one that already is keeps its code.
func asError(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Code: CodeTryAgain, Msg: "tacit", Details: err.Error()}
}
