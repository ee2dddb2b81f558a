package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"tacit.dev/identity"
	"tacit.dev/wire/direct"
)

// TestNoReasonIsOther: what the kernel, TLS and a peer's preamble can answer has a name.
func TestNoReasonIsOther(t *testing.T) {
	rows := []struct {
		err  error
		want string
	}{
		{fmt.Errorf("%w: %w", errNoPort, syscall.EADDRINUSE), reasonSourcePort},
		{fmt.Errorf("%w: %w", errNoPort, syscall.EADDRNOTAVAIL), reasonSourcePort},
		{fmt.Errorf("%w: x", errNoSocket), reasonNoSocket},
		{errOutdated, reasonFormerAddress},
		{net.ErrClosed, reasonReset},
		{context.Canceled, reasonShuttingDown},
		{context.DeadlineExceeded, identity.ReasonTimeout},
		{io.ErrUnexpectedEOF, identity.ReasonPeerClosed},
		{direct.ErrPreamble, reasonBadPreamble},
		{&net.OpError{Op: "local error", Err: errors.New("tls: unexpected message")}, identity.ReasonBadTLS},
		{errors.New("tls: invalid signature by the client certificate"), identity.ReasonBadTLS},
		{tls.RecordHeaderError{Msg: "x"}, identity.ReasonNotTLS},
	}
	for want, all := range map[string][]syscall.Errno{
		reasonConnRefused:         {syscall.ECONNREFUSED},
		reasonForbidden:           {syscall.EACCES, syscall.EPERM},
		identity.ReasonTimeout:    {syscall.ETIMEDOUT},
		identity.ReasonPeerClosed: {syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED},
		reasonNoResources:         {syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS},
		reasonBadAddress:          {syscall.EINVAL, syscall.EAFNOSUPPORT, syscall.EADDRNOTAVAIL},
		reasonUnreachable: {syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, syscall.EHOSTDOWN, syscall.ENONET,
			syscall.ENODEV, syscall.EPROTO, syscall.ENOPROTOOPT, syscall.EOPNOTSUPP, syscall.EMSGSIZE},
	} {
		for _, errno := range all {
			rows = append(rows, struct {
				err  error
				want string
			}{fmt.Errorf("dial: %w", os.NewSyscallError("connect", errno)), want})
		}
	}
	for _, r := range rows {
		if got := refusalOf(r.err); got.reason != r.want || got.flags == "" {
			t.Errorf("%v is %q, flags %q: want %q", r.err, got.reason, got.flags, r.want)
		}
	}
}
