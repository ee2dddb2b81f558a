// Package cni is the CNI plugin's one sentence to the agent. The container
// runtime runs tacit-cni, last in its chain, for every pod that begins (ADD) and
// ends (DEL); the plugin says so to the agent, waits for one answer, and exits.
// ADD succeeds only when the agent has answered that the pod is captured, or not
// to be; so a pod that should be in the mesh never runs outside of it. When no agent
// is there, the pods of namespaces that the last one has named as enrolled wait, and those
// of others begin; if that is not known, all wait.
//
// The package holds both ends of the sentence. It refuses to know what the agent
// does, and imports the standard library only: the plugin is started for every
// pod, and has to be small.
package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	// DefaultAgent is where the agent listens.
	DefaultAgent = "/run/tacit/cni.sock"
	// DefaultTimeout is how long an ADD waits for the agent.
	DefaultTimeout = 30 * time.Second

	maxTimeout = 10 * time.Minute
	maxStdin   = 4 << 20
	maxName    = 253
)

// Versions of the CNI specification that the plugin answers in. As the last of a
// chain it passes the result on as it came, which is the same in all of them. The first
// two know of no chains; but libcni gives prevResult in any version, and a base that asks
// for them keeps its own.
func versions() []string {
	return []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
}

// Codes of CNI errors (CNI specification, section 5, Error).
const (
	CodeVersion  = 1  // incompatible CNI version
	CodeEnv      = 4  // invalid environment
	CodeIO       = 5  // stdin could not be read
	CodeDecode   = 6  // stdin is no JSON
	CodeConfig   = 7  // invalid network configuration
	CodeTryAgain = 11 // the runtime should try again later

	// CodeEnding is our own (100 and more are a plugin's): the agent ends, or hands
	// over to the next one, which is to be asked.
	CodeEnding = 100
)

// Error is a CNI error object.
type Error struct {
	CNIVersion string `json:"cniVersion,omitempty"`
	Code       int    `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details,omitempty"`
}

func (e *Error) Error() string {
	if e.Details == "" {
		return e.Msg
	}
	return e.Msg + ": " + e.Details
}

func fault(code int, msg string, err error) *Error {
	e := &Error{Code: code, Msg: msg}
	if err != nil {
		e.Details = err.Error()
	}
	return e
}

// Command is what the runtime asks for.
type Command string

const (
	Add     Command = "ADD"
	Del     Command = "DEL"
	Check   Command = "CHECK"
	Status  Command = "STATUS"
	Version Command = "VERSION"
	GC      Command = "GC"
)

// Request is the sentence to the agent.
type Request struct {
	Command Command `json:"command"`
	// ContainerID names the sandbox; every other field but Command may be empty
	// in a DEL, and all of them in a STATUS.
	ContainerID string `json:"containerID,omitempty"`
	// Netns is the path of the pod's network namespace.
	Netns     string `json:"netns,omitempty"`
	IfName    string `json:"ifName,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	// UID may be empty: old runtimes do not tell it.
	UID string `json:"uid,omitempty"`
	// Addresses are those that the plugins before us gave the pod.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Timeout is how long the plugin waits for the answer.
	Timeout time.Duration `json:"timeout,omitempty"`
}

// Answer is the agent's. A nil Error is yes.
type Answer struct {
	Error *Error `json:"error,omitempty"`
}

// config is the network configuration on stdin, as far as we read it.
type config struct {
	CNIVersion string `json:"cniVersion"`
	Agent      string `json:"agent"`
	Timeout    string `json:"timeout"`
	// Namespaces is the file of WriteNamespaces. Without it, every pod may have to
	// be protected.
	Namespaces string `json:"namespaces"`
	// Exempt are namespaces whose pods are none of ours: the agent is not asked. The
	// mesh's own are among them, for it could not begin otherwise.
	Exempt     []string        `json:"exempt"`
	PrevResult json.RawMessage `json:"prevResult"`

	timeout time.Duration
}

// readConfig reads and checks stdin. The configuration is returned also with an
// error, as far as it was read: the error must be told in its version.
func readConfig(stdin io.Reader) (config, *Error) {
	c := config{timeout: DefaultTimeout}
	b, err := io.ReadAll(io.LimitReader(stdin, maxStdin+1))
	if err == nil && len(b) > maxStdin {
		err = fmt.Errorf("more than %d bytes", maxStdin)
	}
	if err != nil {
		return c, fault(CodeIO, "read the network configuration", err)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return config{}, fault(CodeDecode, "read the network configuration", err)
	}
	if c.CNIVersion == "" {
		c.CNIVersion = "0.1.0" // as libcni takes it
	}
	if !slices.Contains(versions(), c.CNIVersion) {
		return c, fault(CodeVersion, fmt.Sprintf("cniVersion %q: want one of %s", c.CNIVersion, strings.Join(versions(), " ")), nil)
	}
	if c.Agent == "" {
		c.Agent = DefaultAgent
	}
	c.timeout = DefaultTimeout
	if c.Timeout != "" {
		if c.timeout, err = time.ParseDuration(c.Timeout); err != nil || c.timeout <= 0 || c.timeout > maxTimeout {
			return c, fault(CodeConfig, fmt.Sprintf("timeout %q: want a duration of at most %v, such as 30s", c.Timeout, maxTimeout), nil)
		}
	}
	return c, nil
}

// request puts together what the environment and the configuration say.
func request(env func(string) string, c config) (Request, *Error) {
	r := Request{
		Command:     Command(env("CNI_COMMAND")),
		ContainerID: env("CNI_CONTAINERID"),
		Netns:       env("CNI_NETNS"),
		IfName:      env("CNI_IFNAME"),
		Timeout:     c.timeout,
	}
	args := arguments(env("CNI_ARGS"))
	r.Namespace, r.Name, r.UID = args["K8S_POD_NAMESPACE"], args["K8S_POD_NAME"], args["K8S_POD_UID"]
	var err error
	if r.Addresses, err = addresses(c.PrevResult); err != nil {
		return r, fault(CodeConfig, "read prevResult", err)
	}
	if err := r.Validate(); err != nil {
		return r, fault(CodeEnv, "the request is incomplete", err)
	}
	if (r.Command == Add || r.Command == Check) && len(c.PrevResult) == 0 {
		return r, fault(CodeConfig, "no prevResult: tacit-cni gives no addresses, it must come after a plugin that does", nil)
	}
	return r, nil
}

// Validate says what is missing or malformed. The agent calls it too: it
// believes the socket's owner, not its words.
func (r *Request) Validate() error {
	var errs []error
	need := func(what, value string) {
		if value == "" {
			errs = append(errs, fmt.Errorf("%s is empty", what))
		}
	}
	switch r.Command {
	case Add, Check:
		need("CNI_CONTAINERID", r.ContainerID)
		need("CNI_NETNS", r.Netns)
		need("K8S_POD_NAMESPACE in CNI_ARGS", r.Namespace)
		need("K8S_POD_NAME in CNI_ARGS", r.Name)
	case Del:
		need("CNI_CONTAINERID", r.ContainerID)
	case Status:
	default:
		errs = append(errs, fmt.Errorf("CNI_COMMAND %.20q: want ADD, DEL, CHECK, STATUS or VERSION", r.Command))
	}
	for _, s := range []string{r.ContainerID, r.Namespace, r.Name, r.UID} {
		if !plain(s) {
			errs = append(errs, fmt.Errorf("%.300q: want at most %d of a-z A-Z 0-9 . _ -", s, maxName))
		}
	}
	if len(r.Netns) > 4096 || (r.Netns != "" && r.Netns[0] != '/') {
		errs = append(errs, fmt.Errorf("CNI_NETNS %.100q: want an absolute path", r.Netns))
	}
	if r.Timeout < 0 || r.Timeout > maxTimeout {
		errs = append(errs, fmt.Errorf("timeout %v: want at most %v", r.Timeout, maxTimeout))
	}
	return errors.Join(errs...)
}

// plain accepts what Kubernetes and the runtimes use in names; the agent makes
// file names of some. "." and ".." are refused.
func plain(s string) bool {
	if len(s) > maxName || s == "." || s == ".." {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// arguments reads CNI_ARGS: KEY=VALUE;KEY=VALUE.
func arguments(s string) map[string]string {
	args := make(map[string]string)
	for pair := range strings.SplitSeq(s, ";") {
		if k, v, ok := strings.Cut(pair, "="); ok {
			args[k] = v
		}
	}
	return args
}

// addresses takes the pod's addresses out of a CNI result.
func addresses(result json.RawMessage) ([]netip.Addr, error) {
	if len(result) == 0 {
		return nil, nil
	}
	type old struct {
		IP string `json:"ip"`
	}
	var r struct {
		IPs []struct {
			Address string `json:"address"`
		} `json:"ips"`
		// Of versions before 0.3.0.
		IP4, IP6 *old
	}
	if err := json.Unmarshal(result, &r); err != nil {
		return nil, err
	}
	var texts []string
	for _, ip := range r.IPs {
		texts = append(texts, ip.Address)
	}
	for _, o := range []*old{r.IP4, r.IP6} {
		if o != nil {
			texts = append(texts, o.IP)
		}
	}
	var as []netip.Addr
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("address: %w", err)
		}
		as = append(as, p.Addr().Unmap().WithZone(""))
	}
	return as, nil
}
