package cluster

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
)

// forwarder lets the host reach the API server: it listens on a loopback port of
// the host and dials from a thread in the control plane's namespace. Nothing of
// the host's network is configured.
type forwarder struct {
	listener net.Listener
	netns    string // path
	target   string
	done     chan struct{}
}

func newForwarder(netns, target string) (*forwarder, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return &forwarder{listener: l, netns: netns, target: target, done: make(chan struct{})}, nil
}

func (f *forwarder) address() string { return f.listener.Addr().String() }

// run accepts until close, and returns when all connections have ended.
func (f *forwarder) run() {
	defer close(f.done)
	var conns sync.WaitGroup
	defer conns.Wait()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel() // close ended the listener: now the connections end
	for {
		near, err := f.listener.Accept()
		if err != nil {
			return
		}
		conns.Go(func() { f.join(ctx, near) })
	}
}

func (f *forwarder) close() {
	f.listener.Close()
	<-f.done
}

func (f *forwarder) join(ctx context.Context, near net.Conn) {
	defer near.Close()
	far, err := f.dial(ctx)
	if err != nil {
		return // the client sees the connection close, as if nobody listened
	}
	defer far.Close()
	stop := context.AfterFunc(ctx, func() { near.Close(); far.Close() })
	defer stop()
	var back sync.WaitGroup
	back.Go(func() { pour(near, far) })
	pour(far, near)
	back.Wait()
}

func (f *forwarder) dial(ctx context.Context) (conn net.Conn, err error) {
	err = within(f.netns, func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", f.target) // an address: dialled on this thread
		return err
	})
	return conn, err
}

func pour(to, from net.Conn) {
	_, err := io.Copy(to, from)
	half, ok := to.(interface{ CloseWrite() error })
	if err == nil && ok {
		err = half.CloseWrite()
	}
	if err != nil && !errors.Is(err, net.ErrClosed) {
		to.Close() // broken: the other direction has nobody to talk to either
		from.Close()
	}
}
