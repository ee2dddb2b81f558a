package relay

import (
	"net"
	"time"
)

// TCPConn is a TCP connection as a Conn.
type TCPConn struct{ c *net.TCPConn }

// TCP takes over c and sets SO_LINGER to zero at once, so that the death of this
// process resets the connection instead of ending it as if all had been said.
func TCP(c *net.TCPConn) *TCPConn { c.SetLinger(0); return &TCPConn{c} }

// Raw returns the connection that TCP was given. It stays the TCPConn's.
func (t *TCPConn) Raw() *net.TCPConn { return t.c }

func (t *TCPConn) Read(p []byte) (int, error)         { return t.c.Read(p) }
func (t *TCPConn) Write(p []byte) (int, error)        { return t.c.Write(p) }
func (t *TCPConn) CloseWrite() error                  { return t.c.CloseWrite() }
func (t *TCPConn) Abort() error                       { return t.c.Close() }
func (t *TCPConn) Close() error                       { t.c.SetLinger(-1); return t.c.Close() }
func (t *TCPConn) AwaitReadable() error               { return nil }
func (t *TCPConn) AwaitReset() error                  { return nil }
func (t *TCPConn) SetReadDeadline(d time.Time) error  { return t.c.SetReadDeadline(d) }
func (t *TCPConn) SetWriteDeadline(d time.Time) error { return t.c.SetWriteDeadline(d) }
