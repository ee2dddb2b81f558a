package lab

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"tacit.dev/admin"
)

// adminGet reads a page of a process's admin server, which listens on the loopback
// of its own namespace.
func (c *Cluster) adminGet(ctx context.Context, process, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	address, dial, err := c.adminOf(process)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{DialContext: dial, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return nil, err
	}
	answer, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", process, err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("ask %s for %s: %s: %s", process, path, answer.Status, strings.TrimSpace(string(body)))
	}
	return body, err
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

func (c *Cluster) adminOf(process string) (string, dialFunc, error) {
	var d net.Dialer
	if process == "control" {
		return controlAdmin, d.DialContext, nil
	}
	name, role, _ := strings.Cut(process, "/")
	n, err := c.node(name)
	if err != nil {
		return "", nil, err
	}
	address := c.teamOf(n).named(&role).admin(n, role)
	if address == "" {
		return "", nil, fmt.Errorf("process %q: want control, NODE/agent or NODE/proxy", process)
	}
	if role == "agent" {
		return role, func(ctx context.Context, _, _ string) (net.Conn, error) { return admin.Dial(ctx, address) }, nil
	}
	dial := func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = n.ns.Do(func() error {
			conn, err = d.DialContext(ctx, network, address) //nolint: the address is literal, so this thread makes the socket
			return err
		})
		return conn, err
	}
	return address, dial, nil
}

func doDump(ctx context.Context, c *Cluster, call verbCall) error {
	if err := errors.Join(call.want(2, 2), call.done()); err != nil {
		return err
	}
	text, err := c.adminGet(ctx, call.words[0], call.words[1])
	if err != nil {
		return err
	}
	_, err = call.stdout.Write(text)
	return err
}

// lookPatience is how long a verb looks for something if nothing else is said.
const lookPatience = 10 * time.Second

// takeWithin is how long a verb may look for something.
func (call *verbCall) takeWithin(otherwise time.Duration) (time.Duration, error) {
	return time.ParseDuration(call.take("within", otherwise.String()))
}

// look tries until it succeeds; or with a story's "!" expects it to fail, now.
func (call verbCall) look(ctx context.Context, within time.Duration, try func() error) error {
	if call.not {
		if err := try(); err != nil {
			return nil
		}
		return errors.New("it is there")
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return until(ctx, try)
}

// doLog looks for one line with a match of the expression and all of the texts. It
// reads its words itself: key=value is what stands in a log, not an option.
func doLog(ctx context.Context, c *Cluster, call verbCall) error {
	within, err := call.takeWithin(lookPatience)
	if err = errors.Join(err, call.want(1, -1)); err != nil {
		return err
	}
	file, err := c.logOf(call.words[0])
	if err != nil {
		return err
	}
	texts := slices.DeleteFunc(slices.Clone(call.args), func(w string) bool {
		return w == call.words[0] || strings.HasPrefix(w, "within=")
	})
	if len(texts) == 0 {
		text, err := os.ReadFile(file)
		if err == nil {
			_, err = call.stdout.Write(text)
		}
		return err
	}
	pattern, texts := texts[0], texts[1:]
	expr, err := regexp.Compile(pattern)
	if err != nil {
		return usageError(err.Error())
	}
	return call.look(ctx, within, func() error { return showLines(call.stdout, file, expr, texts) })
}

// showLines writes all lines that match; it is an error if none does.
func showLines(w io.Writer, path string, expr *regexp.Regexp, texts []string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	found := false
	for lines := bufio.NewReader(f); ; {
		line, err := lines.ReadString('\n')
		lacks := slices.ContainsFunc(texts, func(t string) bool { return !strings.Contains(line, t) })
		if line = strings.TrimSuffix(line, "\n"); (line != "" || err == nil) && !lacks && expr.MatchString(line) {
			found = true
			if _, err := fmt.Fprintln(w, line); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF) && found:
			return nil
		case errors.Is(err, io.EOF):
			return fmt.Errorf("no line matches %q with all of %q", expr, texts)
		case err != nil:
			return err
		}
	}
}

// logOf is the log file of a process of Tacit, of the lab, of a pod, or of a job.
func (c *Cluster) logOf(name string) (string, error) {
	if name == "lab" || c.kept(name) != nil {
		return c.logPath(name), nil
	}
	for _, path := range []string{c.logPath("pod." + podKey(name)), c.logPath("job." + name)} {
		if _, err := os.Stat(path); err == nil && !strings.Contains(name, "..") {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no log of %s: want control, NODE/agent, NODE/proxy, lab, a pod with an application, or a job", name)
}

// doMetric sums the series that have all of the labels.
func doMetric(ctx context.Context, c *Cluster, call verbCall) error {
	within, err := call.takeWithin(lookPatience)
	least, is, most, err2 := call.takeBounds()
	if err = errors.Join(err, err2, call.want(2, 2)); err != nil {
		return err
	}
	process, name, labels := call.words[0], call.words[1], call.options
	if least+is+most == "" {
		sum, err := c.metric(ctx, process, name, labels)
		if err == nil {
			fmt.Fprintln(call.stdout, strconv.FormatFloat(sum, 'f', -1, 64))
		}
		return err
	}
	return call.look(ctx, within, func() error {
		sum, err := c.metric(ctx, process, name, labels)
		if err != nil {
			return err
		}
		return compare(sum, least, is, most)
	})
}

// takeBounds reads at-least, is and at-most; @FILE is the number in a file, such as
// what the verb showed before, and @FILE+N is N more.
func (call *verbCall) takeBounds() (least, is, most string, err error) {
	read := func(key string) string {
		value := call.take(key, "")
		if name, ok := strings.CutPrefix(value, "@"); ok {
			var err2 error
			value, err2 = numberIn(call.dir, name)
			err = errors.Join(err, err2)
		}
		return value
	}
	return read("at-least"), read("is"), read("at-most"), err
}

func numberIn(dir, name string) (string, error) {
	name, more, _ := strings.Cut(name, "+")
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return "", err
	}
	n, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
	if err != nil {
		return "", err
	}
	plus, err := strconv.ParseFloat(cmp.Or(more, "0"), 64)
	return strconv.FormatFloat(n+plus, 'f', -1, 64), err
}

func compare(sum float64, least, is, most string) error {
	check := func(text, word string, ok func(float64) bool) error {
		if text == "" {
			return nil
		}
		want, err := strconv.ParseFloat(text, 64)
		if err == nil && !ok(want) {
			err = fmt.Errorf("it is %v, not %s %v", sum, word, want)
		}
		return err
	}
	return errors.Join(
		check(least, "at least", func(w float64) bool { return sum >= w }),
		check(is, "exactly", func(w float64) bool { return sum == w }),
		check(most, "at most", func(w float64) bool { return sum <= w }))
}

func (c *Cluster) metric(ctx context.Context, process, name string, labels []option) (float64, error) {
	text, err := c.adminGet(ctx, process, "/metrics")
	if err != nil {
		return 0, err
	}
	sum, err := sumOf(text, name, labels)
	if err != nil {
		return 0, fmt.Errorf("metrics of %s: %w", process, err)
	}
	return sum, nil
}

// sumOf adds up the series that have all of the labels; there may be none. A name that
// the process does not know is an error: its sum, 0, would be below any bound.
func sumOf(text []byte, name string, labels []option) (float64, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		return 0, err
	}
	if families[name] == nil {
		return 0, fmt.Errorf("there is no %s", name)
	}
	var sum float64
	for _, m := range families[name].GetMetric() {
		has := map[string]string{}
		for _, l := range m.GetLabel() {
			has[l.GetName()] = l.GetValue()
		}
		if hasLabels(has, labels) {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + m.GetUntyped().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum, nil
}

func hasLabels(has map[string]string, want []option) bool {
	for _, w := range want {
		if value, ok := has[w.key]; !ok || value != w.value {
			return false
		}
	}
	return true
}

// controlStatus is what control tells of a pod; the words are those of /dump/status.
type controlStatus struct {
	Pods []struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
		Identity  string `json:"identity"`
		Wanted    bool   `json:"wanted"`
		Enrolled  bool   `json:"enrolled"`
		Captured  bool   `json:"captured"`
		Direct    bool   `json:"direct"`
		State     string `json:"state"`
		Reason    string `json:"reason"`
	} `json:"pods"`
	Nodes []struct {
		Behind bool `json:"behind"`
	} `json:"nodes"`
}

// proxyPod is what a proxy tells of a pod; the words are those of /dump/pods.
type proxyPod struct {
	Namespace   string    `json:"namespace"`
	Name        string    `json:"name"`
	Identity    string    `json:"identity"`
	State       string    `json:"state"`
	Expiry      time.Time `json:"expiry"`
	Connections map[string]struct {
		Open  int64 `json:"open"`
		Total int64 `json:"total"`
	} `json:"connections"`
}

// podState is what is known of one pod, from all sides.
type podState struct {
	key, node, identity, reason string
	enrolled, captured, direct  bool
	// told says that the proxies of all nodes know what control has published last.
	told bool
	// settled says that control knows the pod and its state is what labels ask for.
	settled bool
	proxy   *proxyPod
}

// protected: enrolled, captured, announced to all nodes, and with a valid certificate.
func (s podState) protected() bool {
	return s.enrolled && s.captured && s.direct && s.told && s.proxy != nil && time.Now().Before(s.proxy.Expiry)
}

func (c *Cluster) states(ctx context.Context) (map[string]podState, error) {
	c.mu.Lock()
	out := map[string]podState{}
	nodes := map[string]bool{}
	for key, p := range c.pods {
		out[key] = podState{key: key, node: p.node.name}
		nodes[p.node.name] = true
	}
	c.mu.Unlock()
	if !c.options.Mesh {
		return out, nil
	}
	text, err := c.adminGet(ctx, "control", "/dump/status")
	var status controlStatus
	if err = cmp.Or(err, json.Unmarshal(orNull(text), &status)); err != nil {
		return out, err
	}
	told := true
	for _, n := range status.Nodes {
		told = told && !n.Behind
	}
	for _, p := range status.Pods {
		key := p.Namespace + "/" + p.Name
		if s, ok := out[key]; ok {
			s.told = told
			s.identity, s.reason, s.enrolled, s.captured, s.direct = p.Identity, p.Reason, p.Enrolled, p.Captured, p.Direct
			s.settled = p.Wanted == p.Direct && p.Wanted == p.Captured
			out[key] = s
		}
	}
	var errs []error
	for n := range nodes {
		errs = append(errs, c.proxyStates(ctx, n, out))
	}
	return out, errors.Join(errs...)
}

func orNull(text []byte) []byte {
	if len(text) == 0 {
		return []byte("null")
	}
	return text
}

func (c *Cluster) proxyStates(ctx context.Context, node string, out map[string]podState) error {
	text, err := c.adminGet(ctx, node+"/proxy", "/dump/pods")
	if err != nil {
		return err
	}
	var pods []proxyPod
	if err := json.Unmarshal(text, &pods); err != nil {
		return fmt.Errorf("pods of %s/proxy: %w", node, err)
	}
	for _, p := range pods {
		key := p.Namespace + "/" + p.Name
		if s, ok := out[key]; ok {
			s.proxy = &p
			out[key] = s
		}
	}
	return nil
}

func doStatus(ctx context.Context, c *Cluster, call verbCall) error {
	if err := errors.Join(call.want(0, 0), call.done()); err != nil {
		return err
	}
	states, err := c.states(ctx)
	w := tabwriter.NewWriter(call.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "POD\tNODE\tENROLLED\tPROTECTED\tIDENTITY\tCERTIFICATE EXPIRES\tMTLS\tPLAINTEXT\tOUTSIDE\tREASON")
	for _, s := range sortedValues(states) {
		expiry, mtls, plain, outside := "-", "-", "-", "-"
		if s.proxy != nil {
			expiry = s.proxy.Expiry.UTC().Format(time.DateTime)
			mtls, plain, outside = s.proxy.count("mutual_tls"), s.proxy.count("plaintext"), s.proxy.count("outside")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.key, s.node,
			yesNo(s.enrolled), yesNo(s.protected()), cmp.Or(s.identity, "-"), expiry, mtls, plain, outside, cmp.Or(s.reason, "-"))
	}
	return errors.Join(w.Flush(), err)
}

// count is how many connections of a kind there were, and how many are open.
func (p *proxyPod) count(kind string) string {
	n := p.Connections[kind]
	return fmt.Sprintf("%d (%d open)", n.Total, n.Open)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// doWait waits for a state of pods, for processes, or for the end of a job.
func doWait(ctx context.Context, c *Cluster, call verbCall) error {
	patience := lookPatience
	if len(call.words) == 1 {
		patience = jobPatience
	}
	within, err := call.takeWithin(patience)
	if err = errors.Join(err, call.want(1, -1), call.done()); err != nil {
		return err
	}
	what, names := call.words[0], call.words[1:]
	reached := map[string]func(podState) bool{
		"enrolled":  func(s podState) bool { return s.enrolled },
		"protected": podState.protected,
		"outside":   func(s podState) bool { return !s.enrolled && !s.captured && !s.direct && s.proxy == nil },
	}[what]
	switch {
	case len(names) == 0:
		return c.finish(ctx, call, what, 0, within)
	case what == "ready":
		for _, n := range names {
			if err := c.awaitReady(ctx, n); err != nil {
				return err
			}
		}
		return nil
	case what == "gone":
		return call.look(ctx, within, func() error { return c.allGone(names) })
	case reached == nil:
		return usageError("wait for " + what)
	}
	return call.look(ctx, within, func() error { return c.allReached(ctx, what, names, reached) })
}

func (c *Cluster) allGone(names []string) error {
	for _, n := range names {
		if _, err := c.pod(n); err == nil {
			return fmt.Errorf("pod %s is there", n)
		}
	}
	return nil
}

func (c *Cluster) allReached(ctx context.Context, what string, names []string, reached func(podState) bool) error {
	states, err := c.states(ctx)
	if err != nil {
		return err
	}
	for _, n := range names {
		found := false
		for key, s := range states {
			if match, _ := path.Match(podKey(n), key); !match {
				continue
			}
			if found = true; !reached(s) {
				return fmt.Errorf("pod %s is not %s: %+v %s", key, what, s, s.reason)
			}
		}
		if !found {
			return fmt.Errorf("there is no pod %s", n)
		}
	}
	return nil
}
