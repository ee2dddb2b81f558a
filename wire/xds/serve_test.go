package xds

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// A peer that has no stream, as it has no token, does not keep its connection, though it
// answers every ping.
func TestConnectionsWithoutAStreamEnd(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := ServeConfig{Listener: lis, TLS: newPKI(t).conf, Idle: 50 * time.Millisecond}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, cfg) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	conn, err := tls.Dial("tcp", lis.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	const settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	if _, err := io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+settings); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		err = answerFrame(conn)
	}
	if !errors.Is(err, io.EOF) {
		t.Errorf("the connection: %v, want its end", err)
	}
}

// answerFrame reads one frame of HTTP/2, and answers it if it is a ping.
func answerFrame(c net.Conn) error {
	head := make([]byte, 9)
	if _, err := io.ReadFull(c, head); err != nil {
		return err
	}
	body := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
	if _, err := io.ReadFull(c, body); err != nil {
		return err
	}
	const ping, ack = 6, 1
	if head[3] != ping || head[4]&ack != 0 {
		return nil
	}
	head[4] |= ack
	_, err := c.Write(bytes.Join([][]byte{head, body}, nil))
	return err
}
