package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"tacit.dev/identity"
	"tacit.dev/wire/direct"
)

// Why a connection was refused, for the counter tacit_refused_connections_total
// and the log, next to the reasons of package identity.
const (
	reasonCapturePort     = "capture_port"
	reasonNotCaptured     = "not_captured"
	reasonNoWorld         = "no_world"
	reasonNoEndpoint      = "no_endpoint"
	reasonFormerAddress   = "former_address"
	reasonUnknownAddress  = "unknown_address"
	reasonContested       = "contested_address"
	reasonNoAddress       = "no_address"
	reasonNoSocket        = "no_socket"
	reasonConnectionLimit = "connection_limit"
	reasonHandshakeLimit  = "handshake_limit"
	reasonQuietLimit      = "quiet_limit"
	reasonMemoryLimit     = "memory_limit"
	reasonConnRefused     = "connection_refused"
	reasonUnreachable     = "unreachable"
	reasonSourcePort      = "source_port"
	reasonForbidden       = "forbidden"
	reasonNoResources     = "no_resources"
	reasonBadAddress      = "bad_address"
	reasonBadPreamble     = "bad_preamble"
	reasonReset           = "reset"
	reasonShuttingDown    = "shutting_down"
	reasonDenied          = "denied"
	reasonRevoked         = "revoked"
	reasonMaxAge          = "max_age"
	reasonStrict          = "strict"
)

// Envoy's response flags, as Istio's dashboards know them.
const (
	flagUpstreamFailure = "UF"
	flagNoEndpoint      = "UH"
	flagUpstreamReset   = "UC"
	flagDownstreamReset = "DC"
	flagDenied          = "UAEX"
	flagOverload        = "UMSDR"
	flagTimeout         = "DT"
)

var (
	errHandshakeLimit  = errors.New("too many handshakes under way (--max-handshakes)")
	errConnectionLimit = errors.New("too many connections of this pod, or to it, or to it from this address (--max-connections-per-pod)")
	errQuietLimit      = errors.New("too many silent connections to this pod, or from this address (--max-connections-per-pod)")
	errGone            = errors.New("the connection was reset while it waited for its handshake")
	errNoWorld         = errors.New("control has not told yet who is in the mesh")
	errPodGone         = errors.New("the pod or the proxy goes away")
)

// refusal is why a connection ends before its first byte has gone through.
type refusal struct {
	// reason is one of a bounded set, for counters.
	reason string
	// flags are Envoy's.
	flags string
	err   error
}

func (r *refusal) Error() string {
	if r.err == nil {
		return r.reason
	}
	return r.reason + ": " + r.err.Error()
}

func (r *refusal) Unwrap() error { return r.err }

// refuse makes a refusal of our own.
func refuse(reason, flags, format string, args ...any) *refusal {
	return &refusal{reason, flags, fmt.Errorf(format, args...)}
}

// refusalOf names what went wrong on the way to the other side.
func refusalOf(err error) *refusal {
	var r *refusal
	switch {
	case errors.As(err, &r):
		return r
	case errors.Is(err, errHandshakeLimit):
		return &refusal{reasonHandshakeLimit, flagOverload, err}
	case errors.Is(err, errGone):
		return &refusal{reasonReset, flagDownstreamReset, err}
	case errors.Is(err, errOutdated):
		return &refusal{reasonFormerAddress, flagNoEndpoint, err}
	case errors.Is(err, errNoSocket):
		return &refusal{reasonNoSocket, flagOverload, err}
	case errors.Is(err, errNoPort):
		return &refusal{reasonSourcePort, flagUpstreamFailure, err}
	case errors.Is(err, direct.ErrPreamble):
		return &refusal{reasonBadPreamble, flagUpstreamFailure, err}
	case isTimeout(err):
		return &refusal{identity.ReasonTimeout, flagTimeout, err}
	case errors.Is(err, context.Canceled):
		return &refusal{reasonShuttingDown, flagUpstreamReset, err}
	case errors.Is(err, net.ErrClosed):
		return &refusal{reasonReset, flagUpstreamReset, err}
	}
	if reason := reasonOfErrno(err); reason != "" {
		return &refusal{reason, flagUpstreamFailure, err}
	}
	return &refusal{identity.Reason(err), flagUpstreamFailure, err}
}

// reasonOfErrno names what the kernel answers to a dial, "" for what it does not.
func reasonOfErrno(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return ""
	}
	switch errno {
	case syscall.ECONNREFUSED:
		return reasonConnRefused
	case syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, syscall.EHOSTDOWN, syscall.ENONET, syscall.ENODEV,
		syscall.EPROTO, syscall.ENOPROTOOPT, syscall.EOPNOTSUPP, syscall.EMSGSIZE: // answers of ICMP, too
		return reasonUnreachable
	case syscall.EACCES, syscall.EPERM: // by a rule, a route or a program of the pod's network
		return reasonForbidden
	case syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS:
		return reasonNoResources
	case syscall.EINVAL, syscall.EAFNOSUPPORT, syscall.EADDRNOTAVAIL:
		return reasonBadAddress
	}
	return ""
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.Is(err, syscall.ETIMEDOUT) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.Is(err, context.DeadlineExceeded) || errors.As(err, &n) && n.Timeout()
}

// Why an application sees another source port than its client has.
const (
	portInUse    = "in_use"
	portNoAgent  = "no_agent"
	portNotBound = "not_bound"
)

func portReason(err error) string {
	switch {
	case errors.Is(err, errNoBinder):
		return portNoAgent
	case errors.Is(err, errNotBound):
		return portNotBound
	}
	return portInUse
}

// refusalOfReply names a server's status other than ok.
func refusalOfReply(r direct.Reply) *refusal {
	err := errors.New("the other side answered: " + r.Reason)
	switch r.Status {
	case direct.StatusDenied:
		return &refusal{reasonDenied, flagDenied, err}
	case direct.StatusRefused:
		return &refusal{reasonConnRefused, flagUpstreamFailure, err}
	case direct.StatusTimedOut:
		return &refusal{identity.ReasonTimeout, flagTimeout, err}
	case direct.StatusShuttingDown:
		return &refusal{reasonShuttingDown, flagUpstreamFailure, err}
	}
	return &refusal{reasonUnreachable, flagUpstreamFailure, err}
}

// replyOf tells the client's proxy why its connection was refused. Only the
// words that help it go over the wire, no addresses of ours.
func replyOf(r *refusal) direct.Reply {
	reply := direct.Reply{Status: direct.StatusUnreachable, Reason: r.reason}
	switch r.reason {
	case identity.ReasonWrongIdentity, reasonDenied, reasonRevoked:
		reply.Status = direct.StatusDenied
	case reasonConnRefused:
		reply.Status = direct.StatusRefused
	case identity.ReasonTimeout:
		reply.Status = direct.StatusTimedOut
	case reasonShuttingDown:
		reply.Status = direct.StatusShuttingDown
	}
	var errno syscall.Errno
	if errors.As(r.err, &errno) {
		reply.Reason = errno.Error()
	}
	var by denial
	if errors.As(r.err, &by) {
		reply.Reason = "policy " + by.Policy
	}
	return reply
}
